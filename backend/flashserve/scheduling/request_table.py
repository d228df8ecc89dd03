"""All requests that have not ended: by id, by deadline, and how many of them ask for what costs every step a look."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator

from flashserve.scheduling.matcher import Matcher
from flashserve.scheduling.request import Request


class RequestTable:
    """Whoever adds and removes requests is its one writer."""

    def __init__(self) -> None:
        self._by_id: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self.get = self._by_id.get  # asked for every row of every step
        self.num_with_progress = 0  # that tell how far their prompts are
        self.num_pooled = 0  # that are for embeddings
        self.num_constrained = 0  # that may not choose any token they like

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_id.values())

    def __getitem__(self, request_id: int) -> Request:
        return self._by_id[request_id]

    def add(self, request: Request) -> None:
        self._by_id[request.id] = request
        self.num_with_progress += request.return_progress
        self.num_pooled += request.pooled is not None
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def constrain(self, request: Request, matcher: Matcher) -> None:
        """Let a request that has not begun keep to what the matcher says."""
        request.constrain(matcher)
        self.num_constrained += 1

    def remove(self, request: Request) -> None:
        del self._by_id[request.id]
        self.num_with_progress -= request.return_progress
        self.num_pooled -= request.pooled is not None
        self.num_constrained -= request.is_constrained
        if len(self._deadlines) > 64 + 2 * len(self._by_id):  # most requests end long before their deadline
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._by_id]
            heapq.heapify(self._deadlines)

    def take_expired(self, now: float) -> Iterator[Request]:
        """Those whose deadline has passed, each once."""
        while self._deadlines and self._deadlines[0][0] <= now:
            request = self.get(heapq.heappop(self._deadlines)[1])
            if request is not None:
                yield request

    def check_integrity(self, ids: Iterable[int]) -> None:
        """Raise RuntimeError if it does not hold just these, or has lost count of them (linear time)."""
        if sorted(ids) != sorted(self._by_id):
            raise RuntimeError(f"requests {sorted(ids)} are queued or running, {sorted(self._by_id)} are known")
        requests = self._by_id.values()
        wanted = (
            sum(request.return_progress for request in requests),
            sum(request.pooled is not None for request in requests),
            sum(request.is_constrained for request in requests),
        )
        if (self.num_with_progress, self.num_pooled, self.num_constrained) != wanted:
            raise RuntimeError(
                f"{self.num_with_progress} tell of their prompts, {self.num_pooled} embed, {self.num_constrained} are "
                f"constrained, not {wanted}"
            )
