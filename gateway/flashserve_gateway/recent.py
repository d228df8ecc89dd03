"""The last requests, as bars over time; and what static batching would have done with the same ones.

The page draws both, which explains continuous batching better than words do. A bar holds times and counts, never what
was said.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flashserve_client import Timings

_KEPT = 64
_WINDOW_S = 60.0
_GATHER_S = 0.05
"""A server with static batches waits a little for those that come nearly together."""


@dataclass
class Bar:
    """One request in an engine. Times of time.monotonic, None where that is yet to come. Its call writes to it."""

    model: str
    queued: float = field(default_factory=time.monotonic)
    start: float | None = None
    """Of its first step; known at the end, from the engine's own figures."""
    first: float | None = None
    """When its first token came."""
    ended: float | None = None
    tokens: int = 0

    def end(self, timings: Timings | None) -> None:
        """``timings``: what the engine says of an answer that is whole."""
        self.ended = time.monotonic()
        if timings is None:
            return
        if self.first is None and timings.decode_ms is not None:  # it came as a whole
            self.first = max(self.queued, self.ended - timings.decode_ms / 1000)
        if self.first is not None and timings.prefill_ms is not None:
            self.start = max(self.queued, self.first - timings.prefill_ms / 1000)

    def span(self, now: float) -> Span:
        """As far as it has come. The wait of one that has begun counts as prefill until the engine tells them apart."""
        end = self.ended if self.ended is not None else now
        first = self.first if self.first is not None else end
        start = self.start if self.start is not None else (self.queued if self.first is not None else end)
        return Span(self.queued, start, first, end, end, self.tokens)


@dataclass(frozen=True)
class Span:
    """A request in order of time: it waits, is read (prefill), written (decode), and in a static batch holds its place
    until the batch ends. In seconds."""

    queued: float
    start: float
    first: float
    last: float
    """When its last token came."""
    end: float
    """When its place is free."""
    tokens: int


def peak(spans: Sequence[Span]) -> int:
    """How many ran at a time, at most: the places that a batch had."""
    edges = sorted([(span.start, 1) for span in spans] + [(span.end, -1) for span in spans])
    running = most = 0
    for _, change in edges:
        running += change
        most = max(most, running)
    return max(1, most)


def static_batches(spans: Sequence[Span], size: int, gather_s: float = 0.0) -> list[Span]:
    """The same requests in static batches of at most ``size``, in their order.

    Whenever the engine is free, it takes as many as wait by then or come within ``gather_s`` of the first, reads all
    their prompts, and writes until the longest answer is done; who comes meanwhile waits, and who is done keeps its
    place. Prompts and answers take as long as they did, those of a batch at the same time. That is the best case for
    it: it waits for no full batch, nor for one who does not come, and pads nothing.
    """
    if size < 1:
        raise ValueError(f"a batch of {size} requests")
    waiting = deque(sorted(spans, key=lambda span: span.queued))
    batched: list[Span] = []
    free_at = -float("inf")
    while waiting:
        closes_at = max(free_at, waiting[0].queued + gather_s)
        batch: list[Span] = []
        while waiting and len(batch) < size and (not batch or waiting[0].queued <= closes_at):
            batch.append(waiting.popleft())
        start = max(free_at, batch[-1].queued)
        first = start + max(span.first - span.start for span in batch)
        free_at = first + max(span.last - span.first for span in batch)
        batched += [
            Span(span.queued, start, first, first + span.last - span.first, free_at, span.tokens) for span in batch
        ]
    return batched


class RecentRequests:
    """The last of all models, in a ring. Calls add to it."""

    def __init__(self, kept: int = _KEPT) -> None:
        self._bars: deque[Bar] = deque(maxlen=kept)

    def begin(self, model: str) -> Bar:
        """A request that is sent to an engine now."""
        bar = Bar(model)
        self._bars.append(bar)
        return bar

    def pictures(self, may_see: Callable[[str], bool], now: float | None = None) -> dict[str, dict[str, Any]]:
        """By model: the requests of the last minute as they ran and in static batches, as lists of queued, start,
        first, last, end (seconds from now on, negative: ago) and tokens."""
        now = time.monotonic() if now is None else now
        by_model: dict[str, list[Span]] = {}
        for bar in self._bars:
            if may_see(bar.model) and (bar.ended is None or bar.ended > now - _WINDOW_S):
                by_model.setdefault(bar.model, []).append(bar.span(now))
        pictures = {}
        for model, spans in sorted(by_model.items()):
            size = peak(spans)
            static = static_batches(spans, size, _GATHER_S)
            pictures[model] = {"size": size, "continuous": _rows(spans, now), "static": _rows(static, now)}
        return pictures


def _rows(spans: Sequence[Span], now: float) -> list[list[float]]:
    return [
        [*(round(at - now, 4) for at in (span.queued, span.start, span.first, span.last, span.end)), span.tokens]
        for span in sorted(spans, key=lambda span: span.queued)
    ]
