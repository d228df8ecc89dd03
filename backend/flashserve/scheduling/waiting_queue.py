"""The bounded queue of requests that do not run: new ones, and preempted ones."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

from flashserve.scheduling.request import Hold, Request

ADMISSION_PACE_WEIGHT = 0.1  # of the newest interval in the moving average: about the last ten admissions count
MIN_RETRY_MS, MAX_RETRY_MS = 100, 60_000
MAX_OVERTAKEN = 8  # one admission in nine may go against the deadlines


class WaitingQueue:
    """Ordered by (priority, deadline, arrival). Removal is lazy: a heap forgets a request when it surfaces.

    A request with holds is in no heap: nobody waits behind it, and when it is free it has the place that it came for.

    Deadlines must not starve those who have none: the eldest of the best priority is next once
    :data:`MAX_OVERTAKEN` younger ones have been admitted before it. Of two priorities the better one always goes first.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.num_tokens = 0
        self._heap: list[tuple[int, float, float, int]] = []
        self._by_age: list[tuple[int, float, int]] = []
        """The same requests by (priority, arrival)."""
        self._overtaken: dict[int, int] = {}
        """How many younger ones were admitted while this one was the eldest."""
        self._waiting: dict[int, Request] = {}
        self._last_admission: float | None = None
        self._admission_interval_s = 0.1  # until the first two admissions give a better one

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request.id in self._waiting

    def __iter__(self) -> Iterator[Request]:
        return iter(self._waiting.values())

    def has_room(self, num_tokens: int) -> bool:
        """Whether one more request fits. An empty queue takes any request: it would never fit better."""
        if not self._waiting:
            return True
        return len(self._waiting) < self.max_requests and self.num_tokens + num_tokens <= self.max_tokens

    def push(self, request: Request) -> None:
        """Queue a request; a preempted one is not refused, whatever the bounds."""
        self._waiting[request.id] = request
        self.num_tokens += request.terms.num_prompt_tokens
        if not request.holds:
            self._line_up(request)

    def release(self, request: Request, hold: Hold) -> None:
        """One thing less that a waiting request waits for."""
        request.holds.remove(hold)
        if not request.holds:
            self._line_up(request)

    def _line_up(self, request: Request) -> None:
        terms = request.terms
        deadline = math.inf if request.deadline is None else request.deadline
        heapq.heappush(self._heap, (terms.priority, deadline, terms.arrival, request.id))
        heapq.heappush(self._by_age, (terms.priority, terms.arrival, request.id))

    def head(self) -> Request | None:
        """The request that is next, or None."""
        while self._heap and self._heap[0][3] not in self._waiting:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        eldest = self._eldest()
        if self._overtaken.get(eldest.id, 0) >= MAX_OVERTAKEN:
            return eldest
        return self._waiting[self._heap[0][3]]

    def _eldest(self) -> Request:
        """Of the best priority; someone must be waiting."""
        while self._by_age[0][2] not in self._waiting:
            heapq.heappop(self._by_age)
        return self._waiting[self._by_age[0][2]]

    def admit_head(self, now: float) -> Request:
        """Take the head out, and note the pace of admissions for :meth:`retry_after_ms`."""
        request = self.head()
        if request is None:
            raise RuntimeError("no request is waiting")
        eldest = self._eldest()
        if request is not eldest:
            self._overtaken[eldest.id] = self._overtaken.get(eldest.id, 0) + 1
        self._drop(request)
        if self._last_admission is not None:
            # Counted from the request's arrival if nothing waited before it: idle time says nothing of the pace.
            interval = now - max(self._last_admission, request.terms.arrival)
            self._admission_interval_s += ADMISSION_PACE_WEIGHT * (interval - self._admission_interval_s)
        self._last_admission = now
        return request

    def remove(self, request: Request) -> None:
        """Take out a request that ended while it waited."""
        self._drop(request)
        if len(self._heap) > 64 + 2 * len(self._waiting):  # lazy entries must not pile up behind a blocked head
            self._heap = [entry for entry in self._heap if entry[3] in self._waiting]
            heapq.heapify(self._heap)
            self._by_age = [entry for entry in self._by_age if entry[2] in self._waiting]
            heapq.heapify(self._by_age)

    def _drop(self, request: Request) -> None:
        del self._waiting[request.id]
        self._overtaken.pop(request.id, None)
        self.num_tokens -= request.terms.num_prompt_tokens

    def retry_after_ms(self) -> int:
        """When a refused client should try again: after an eighth of the queue was admitted at the recent pace."""
        estimate = 1000 * self._admission_interval_s * max(1, len(self._waiting) / 8)
        return int(min(MAX_RETRY_MS, max(MIN_RETRY_MS, estimate)))
