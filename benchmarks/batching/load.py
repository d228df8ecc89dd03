"""Requests of mixed lengths: all at once, where what batches waste is counted, and arriving over time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.batching.analysis import Rows, in_groups, kv_shares, latencies, slots_of, static_rows, static_steps
from benchmarks.batching.workload import OURS, SERVED, SYSTEMS, mixed_lengths
from benchmarks.common.engines import CONTINUOUS, ENGINES, NAIVE, STATIC
from benchmarks.common.processes import Processes
from benchmarks.common.protocol import Requests

RATES = {
    NAIVE: (0.25, 0.5),
    STATIC: (0.25, 0.5, 1, 2, 4),
    CONTINUOUS: (0.25, 0.5, 1, 2, 4),
    OURS: (1, 2, 4, 8, 12, 16, 24),
    SERVED: (1, 2, 4, 8, 12, 16, 24),
}
"""Requests per second to try, of each system; the first that it cannot keep up with is its last."""
NAIVE_REQUESTS = 8  # of the mixed requests: one by one, all of them would take minutes, at the same rate
KEEPS_UP = 0.85  # of the offered requests per second; below it the queue grows for as long as requests come
SECONDS = 16.0  # in which the requests of one point arrive
FEWEST, MOST = 6, 160  # requests of one point


@dataclass
class Mixed:
    """Everything about one batch of mixed requests that came at once."""

    work: Requests
    batch: int
    context: int
    """The longest that the model could take."""
    systems: dict[str, dict[str, Any]] = field(default_factory=dict)


def measure_mixed(processes: Processes, mixed: Mixed) -> None:
    for name in SYSTEMS:
        one = name == NAIVE
        work = mixed.work.head(NAIVE_REQUESTS) if one else mixed.work
        outcome = processes.run(name, 1 if one else mixed.batch, work)
        found: dict[str, Any] = {
            "requests": len(work),
            "tokens_per_s": outcome.tokens_per_s,
            **latencies(work, outcome),
        }
        if name == STATIC:
            rows = static_rows(in_groups(work.outputs, outcome.starts), mixed.batch)
            found |= {"wasted": rows.wasted, "busy": rows.busy, "steps": static_steps(work.outputs, mixed.batch)}
        elif details := outcome.details:
            # Each row of ours gives a token or is a part of a prompt; none is computed after its end.
            rows = Rows(details["row_steps"], details["row_steps"], details["room"])
            context = min(mixed.context, processes.config["max_position_embeddings"])
            found |= {"wasted": rows.wasted, "busy": rows.busy, "kv": kv_shares(details, mixed.work.longest, context)}
            first, last = details["first_steps"], details["last_steps"]
            found["steps"] = {"first": first, "last": last, "slots": slots_of(first, last)}
            found["kv_lost_tokens"] = (details["kv_allocated"] - details["kv_used"]) / details["running"]
            found["block_size"] = details["block_size"]
        mixed.systems[name] = found
        print(
            f"  {len(work)} mixed requests: {ENGINES[name].title:34} {outcome.tokens_per_s:7.1f} tokens/s", flush=True
        )


@dataclass(frozen=True)
class Point:
    """One system under one load."""

    system: str
    offered: float
    """Requests per second."""
    requests: int
    answered: float
    """Requests per second that it began to compute; fewer than offered where they had to queue."""
    tokens_per_s: float
    latency: dict[str, float]

    @property
    def keeps_up(self) -> bool:
        return self.answered >= KEEPS_UP * self.offered

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "keeps_up": self.keeps_up}


def measure_load(processes: Processes, batch: int, quick: bool, points: list[Point]) -> None:
    """Add the points of all systems, each up to the load that is too much for it."""
    seconds, scale = (3.0, 0.25) if quick else (SECONDS, 1.0)
    for name in SYSTEMS:
        for rate in RATES[name][:: 3 if quick else 1]:
            count = min(MOST, max(FEWEST, round(rate * seconds)))
            work = mixed_lengths(count, rate, processes.config["vocab_size"], scale, seed=1)
            outcome = processes.run(name, 1 if name == NAIVE else batch, work)
            window = work.arrivals[-1] + 1 / rate
            answered = rate * window / max(window, *outcome.starts)
            point = Point(name, rate, count, answered, outcome.tokens_per_s, latencies(work, outcome))
            points.append(point)
            print(
                f"  {rate:6.3g} requests/s: {ENGINES[name].title:34} {point.tokens_per_s:7.1f} tokens/s, "
                f"{point.latency['normalised_p50_ms']:8.1f} ms per token{'' if point.keeps_up else ', too much'}",
                flush=True,
            )
            if not point.keeps_up:
                break
