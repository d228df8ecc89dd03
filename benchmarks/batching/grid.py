"""Requests x batch x output length, all requests at once and of one length.

With equal lengths, requests pass in waves of ``batch`` that cost the same. So one wave of a static batch is measured,
two of continuous batching (enough for its waves to meet), and more requests have that rate; fewer requests than the
batch are a smaller batch. The rate of one request at a time depends on neither, and is measured once per output length.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.batching.workload import SYSTEMS
from benchmarks.common.engines import ENGINES, NAIVE, STATIC
from benchmarks.common.processes import Processes
from benchmarks.common.protocol import Requests


@dataclass
class Grid:
    """Output tokens per second, prompts included, of each round."""

    requests: Sequence[int]
    batches: Sequence[int]
    outputs: Sequence[int]
    prompt: int
    rates: dict[tuple[str, int, int, int], list[float]] = field(default_factory=dict)
    """By system, requests, batch and output length, as measured."""

    def measured(self, name: str, requests: int, batch: int, output: int) -> tuple[str, int, int, int]:
        """The measurement that a cell stands on."""
        if name == NAIVE or min(batch, requests) == 1:
            name, batch = (NAIVE if ENGINES[name].script == ENGINES[NAIVE].script else name), 1
        batch = min(batch, requests)
        return name, min(requests, (1 if name == STATIC else 2) * batch), batch, output

    def rate(self, name: str, requests: int, batch: int, output: int) -> float:
        """The median of the rounds."""
        return statistics.median(self.rates[self.measured(name, requests, batch, output)])

    def speedup(self, name: str, requests: int, batch: int, output: int) -> float:
        """Over one request at a time."""
        return self.rate(name, requests, batch, output) / self.rate(NAIVE, requests, 1, output)

    def measurements(self) -> list[tuple[str, int, int, int]]:
        """All measurements, those that are compared beside each other."""
        keys = [
            self.measured(name, requests, batch, output)
            for output in self.outputs
            for batch in self.batches
            for requests in self.requests
            for name in SYSTEMS
        ]
        return list(dict.fromkeys(keys))

    def as_json(self) -> list[dict[str, Any]]:
        names = ("system", "requests", "batch", "output")
        return [{**dict(zip(names, key, strict=True)), "tokens_per_s": rates} for key, rates in self.rates.items()]


def measure_grid(processes: Processes, grid: Grid, rounds: int) -> None:
    """Fill the grid; each round measures everything once."""
    keys = grid.measurements()
    for number in range(1, rounds + 1):
        for index, key in enumerate(keys, 1):
            name, requests, batch, output = key
            work = Requests.equal(requests, grid.prompt, output, processes.config["vocab_size"])
            outcome = processes.run(name, batch, work)
            grid.rates.setdefault(key, []).append(outcome.tokens_per_s)
            print(
                f"  round {number} of {rounds}, {index} of {len(keys)}: {requests:3} requests, batch {batch:2}, "
                f"{output} out: {ENGINES[name].title:34} {outcome.tokens_per_s:7.1f} tokens/s",
                flush=True,
            )
