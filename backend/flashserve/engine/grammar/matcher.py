"""What the tokens of one sequence may be. Implements Matcher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

log = logging.getLogger(__name__)


class GrammarMatcher:
    """Follows a grammar."""

    follows_samples = True

    def __init__(self, matcher: LLMatcher, end_token: int) -> None:
        """matcher: taken over."""
        self._matcher = matcher
        self._has_failed = False
        self.end_token = end_token

    @property
    def least_tokens(self) -> int:
        return 0

    @property
    def is_done(self) -> bool:
        return bool(self._matcher.is_stopped())

    def forced(self, most: int) -> list[int]:
        """As with masks, a fault of the library ends this sequence alone.

        llguidance writes what is forced as its tokenizer would, behind the token before it, and leaves out what may
        become one token with what follows. Its masks allow just these tokens. Takes some 5 µs.
        """
        try:
            return list(self._matcher.compute_ff_tokens()[:most])
        except Exception:
            log.exception("what a grammar forces could not be computed")
            self._has_failed = True
            return []

    def mask(self) -> bytes:
        """A fault of the library must end this sequence, not the step of all."""
        try:
            return bytes(self._matcher.compute_bitmask())
        except Exception:
            log.exception("a grammar's mask could not be computed")
            self._has_failed = True
            return bytes(4)

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        return None

    def take(self, token_id: int) -> bool:
        return not self._has_failed and bool(self._matcher.consume_token(token_id))

    def copy(self) -> GrammarMatcher:
        return GrammarMatcher(self._matcher.deep_copy(), self.end_token)


class AllowedTokens:
    """The same tokens, always."""

    follows_samples = False
    is_done = False
    end_token = -1
    least_tokens = 0

    def __init__(self, token_ids: Sequence[int]) -> None:
        """token_ids: at least one; of the vocabulary."""
        bits = bytearray(max(token_ids) // 32 * 4 + 4)
        for token_id in token_ids:
            bits[token_id >> 3] |= 1 << (token_id & 7)
        self._mask = bytes(bits)

    def forced(self, most: int) -> list[int]:
        return []

    def mask(self) -> bytes:
        return self._mask

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        return None

    def take(self, token_id: int) -> bool:
        return True

    def copy(self) -> AllowedTokens:
        return self
