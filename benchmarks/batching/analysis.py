"""Figures of a batch's life that need no measuring of their own. Standard library only."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.common.protocol import Requests, Run
from benchmarks.common.results import percentile


@dataclass(frozen=True)
class Rows:
    """Row-steps of decoding: one row of the batch in one step."""

    useful: int
    """They gave a token that somebody had asked for."""
    computed: int
    room: int
    """What all slots could have computed meanwhile."""

    @property
    def wasted(self) -> float:
        """Share of what was computed."""
        return 1 - self.useful / self.computed

    @property
    def busy(self) -> float:
        """Share of the slots' time."""
        return self.useful / self.room


def static_rows(groups: Sequence[Sequence[int]], batch: int) -> Rows:
    """Of static batches with these output lengths: each lasts as long as its longest row, so a row wastes
    ``longest - own`` steps, and slots that no row took are empty all the while."""
    longest = [max(group) for group in groups]
    computed = sum(steps * len(group) for steps, group in zip(longest, groups, strict=True))
    return Rows(sum(map(sum, groups)), computed, batch * sum(longest))


def in_groups(outputs: Sequence[int], starts: Sequence[float]) -> list[list[int]]:
    """The output lengths of requests that began together."""
    pairs = sorted(zip(starts, outputs, strict=True))
    return [[output for _, output in group] for _, group in itertools.groupby(pairs, key=lambda pair: pair[0])]


def static_steps(outputs: Sequence[int], batch: int) -> dict[str, list[int]]:
    """Of static batches in the order of arrival: the step in which each request's batch began, and the one in which it
    ended, and the row of each."""
    first, last, begun = [], [], 0
    for group in (outputs[i : i + batch] for i in range(0, len(outputs), batch)):
        first += [begun] * len(group)
        begun += max(group)
        last += [begun] * len(group)
    return {"first": first, "last": last, "slots": [i % batch for i in range(len(outputs))]}


def kv_shares(details: dict[str, Any], longest: int, context: int) -> dict[str, float]:
    """Used share of the KV memory that is set aside for running requests, averaged over steps: in blocks, as measured;
    and of what contiguous reservations for the same requests at the same times would be.

    longest: prompt and output of the longest request; context: the longest that the model could take.
    """
    used, running = details["kv_used"], details["running"]
    return {
        "paged": used / details["kv_allocated"],
        "contiguous, longest request": used / (running * longest),
        "contiguous, context of the model": used / (running * context),
    }


def slots_of(starts: Sequence[float], ends: Sequence[float]) -> list[int]:
    """A slot for each request, so that no two overlap: the lowest that is free when it starts."""
    slots, free = [0] * len(starts), list(range(len(starts)))
    taken: list[tuple[float, int]] = []
    for i in sorted(range(len(starts)), key=lambda i: (starts[i], i)):
        while taken and taken[0][0] <= starts[i] + 1e-9:
            heapq.heappush(free, heapq.heappop(taken)[1])
        slots[i] = heapq.heappop(free)
        heapq.heappush(taken, (ends[i], slots[i]))
    return slots


def latencies(work: Requests, outcome: Run) -> dict[str, float]:
    """Of requests, counted from their arrival. Normalised: to the last token, divided by the number of tokens."""
    times = list(zip(work.arrivals, outcome.firsts, outcome.ends, work.outputs, strict=True))
    whole = [end - arrival for arrival, _, end, _ in times]
    normalised = [1000 * (end - arrival) / tokens for arrival, _, end, tokens in times]
    ttft = [1000 * (first - arrival) for arrival, first, _, _ in times]
    return {
        "latency_p50_s": percentile(whole, 0.5),
        "latency_p95_s": percentile(whole, 0.95),
        "normalised_p50_ms": percentile(normalised, 0.5),
        "normalised_p95_ms": percentile(normalised, 0.95),
        "ttft_p50_ms": percentile(ttft, 0.5),
        "ttft_p95_ms": percentile(ttft, 0.95),
    }
