"""What is kept of one request, and what its times mean.

All times are `time.perf_counter()` of the process that sent it, in seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# Why a request has no answer: the words of statistics and report.
UNFINISHED = "unfinished"
"""It still ran when the time for late answers was over."""
TIMEOUT = "timeout"
CONNECTION = "connection"
CANCELLED = "cancelled, as planned"
IMPATIENT = "out of patience, as planned"
PLANNED = (CANCELLED, IMPATIENT)
"""The load's own doing: counted apart, and no failure of the server."""


class RequestFailed(Exception):
    """No complete answer. ``kind`` is one of the words above or the server's code, ``message`` is for the log."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


@dataclass(slots=True)
class Record:
    """One request."""

    target: str
    planned: float
    """When it should have been sent; in a closed loop, when it was."""
    sent: float = math.nan
    end: float = math.nan
    chunks: list[tuple[float, int | None]] = field(default_factory=list)
    """Arrival and number of tokens (None: not told) of every chunk that carried a token or text."""
    prompt_tokens: int | None = None
    """From the server's usage, like the next one."""
    output_tokens: int | None = None
    texts: list[str] = field(default_factory=list)
    """Of all chunks; reasoning and tool calls are not part of them."""
    error: str | None = None
    message: str = ""

    def add_chunk(self, time_s: float, tokens: int | None, has_text: bool, answer: str = "") -> None:
        """Role chunks, keep-alives and empty deltas carry nothing and are not counted."""
        self.texts.append(answer)
        if tokens or (tokens is None and has_text):
            self.chunks.append((time_s, tokens))

    @property
    def answer(self) -> str:
        """What a conversation's next turn repeats."""
        return "".join(self.texts)

    @property
    def ttft(self) -> float:
        """From the planned arrival; NaN without a token."""
        return self.chunks[0][0] - self.planned if self.chunks else math.nan

    @property
    def e2e(self) -> float:
        return self.end - self.planned

    @property
    def gaps(self) -> list[tuple[float, int | None]]:
        """Between chunks that carry tokens, each with the number of tokens that ended it."""
        chunks = self.chunks
        return [(chunks[i][0] - chunks[i - 1][0], chunks[i][1]) for i in range(1, len(chunks))]

    @property
    def tpot(self) -> float:
        """(end of the answer - first token) / (output tokens - 1); NaN with fewer than two tokens."""
        if not self.chunks or self.output_tokens is None or self.output_tokens < 2:
            return math.nan
        return (self.end - self.chunks[0][0]) / (self.output_tokens - 1)
