"""What a scheduler knows of constraints on a sequence's tokens."""

from __future__ import annotations

from typing import Protocol


class Matcher(Protocol):
    """Says which tokens one sequence may choose next."""

    @property
    def follows_samples(self) -> bool:
        """Whether the next mask depends on the last sample: then the sequence gets no row before that is known, which
        brings it along, and what is forced behind it."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether the text is complete, and nothing can follow."""
        ...

    @property
    def end_token(self) -> int:
        """What says so: the one token that may still come, which is taken without a step of its own."""
        ...

    @property
    def least_tokens(self) -> int:
        """What a text takes at least, where that matters: a request with room for less is refused."""
        ...

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        """What the text must end with in place of a sample, which may come here, if behind that it would need more
        tokens than are left, so many. None: the sample is taken."""
        ...

    def forced(self, most: int) -> list[int]:
        """The tokens that must come next, at most so many; none where there is a choice, or the text is complete. Of a
        text that is several tokens in several ways, those that masks would leave, one by one."""
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
