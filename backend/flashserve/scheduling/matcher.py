"""What a scheduler knows of constraints on a sequence's tokens."""

from __future__ import annotations

from typing import Protocol


class Matcher(Protocol):
    """Says which tokens one sequence may choose next."""

    @property
    def follows_samples(self) -> bool:
        """Whether the next mask depends on the last sample: then the sequence gets no row before that is known."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the text is complete, and nothing can follow."""
        ...

    @property
    def end_token(self) -> int:
        """What says so: the one token that may still come, which is taken without a step of its own."""
        ...

    def mask(self) -> bytes:
        """A bit for each token that may come next, the lowest of each byte first, in whole words of 4 bytes. Tokens
        behind the last word may not come."""
        ...

    def take(self, token_id: int) -> bool:
        """Go on by a sample. False if it may not come here."""
        ...

    def copy(self) -> Matcher:
        """For another sequence, which goes on from here."""
        ...
