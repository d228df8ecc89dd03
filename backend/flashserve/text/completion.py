"""One sample of a request as it grows: the engine's outputs go in; text, size and end come out. The stub and the
offline API share it."""

from __future__ import annotations

from typing import NamedTuple

from flashserve.protocol import ErrorInfo, FinishReason, GenerateRequest, RequestTimings, TokenOutput
from flashserve.text.output import TextStream
from flashserve.text.tokenizer import Tokenizer

PROMPT_TAIL = 8
"""Tokens of context in which the first generated one is decoded, by tokenizers that need some."""


class Delta(NamedTuple):
    """What came since the last one."""

    text: str
    num_tokens: int


class Completion:
    """Used by one thread. A request for several samples has one for each."""

    def __init__(self, tokenizer: Tokenizer, request: GenerateRequest) -> None:
        self._stream = TextStream(tokenizer, request.params, request.prompt_token_ids[-PROMPT_TAIL:])
        self._parts: list[str] = []
        self.num_delivered = 0
        """Tokens that were in a delta."""
        self.token_ids: list[int] = []
        """Up to and including the one that completed a stop string."""
        self.finish_reason: FinishReason | None = None
        self.error: ErrorInfo | None = None
        """More about the reason "error"."""
        self.timings: RequestTimings | None = None

    @property
    def has_text(self) -> bool:
        """Whether the next delta has some."""
        return bool(self._parts)

    def take(self, output: TokenOutput) -> bool:
        """Add an output, unless it comes after the end.

        Returns whether a stop string ended the sample, of which the engine does not know: it goes on until told.
        """
        if self.finish_reason is not None:
            return False
        stopped = False
        if output.token_ids:
            text, num_tokens, stopped = self._stream.push(output.token_ids, output.finish_reason == "stop")
            self._add(text)
            self.token_ids += output.token_ids[:num_tokens]
        if output.timings is not None:
            self.timings = output.timings
        self.finish_reason, self.error = "stop" if stopped else output.finish_reason, output.error
        if self.finish_reason is not None:
            self.finish_text()
        return stopped and output.finish_reason is None

    def finish_text(self) -> None:
        """No output follows: what was held back for a stop string that never came is text."""
        self._add(self._stream.finish())

    def delta(self) -> Delta:
        """Text and number of tokens since the last call."""
        delta = Delta("".join(self._parts), len(self.token_ids) - self.num_delivered)
        self._parts.clear()
        self.num_delivered = len(self.token_ids)
        return delta

    def _add(self, text: str) -> None:
        if text:
            self._parts.append(text)
