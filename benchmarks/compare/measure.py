"""Rounds in which every engine takes its turn, and what they gave."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from benchmarks.common.engines import ENGINES, Engine
from benchmarks.common.environments import NotAvailable
from benchmarks.common.processes import Processes, Started
from benchmarks.common.protocol import Requests, Run
from benchmarks.common.results import percentile
from benchmarks.common.worker import EngineError, WorkerGone

OURS = "flashserve"
ENOUGH_REQUESTS = 2  # of engines that compute one at a time: more would only take longer


@dataclass(frozen=True)
class Cell:
    """One thing to measure: requests of one length, ``batch`` of them at once."""

    prompt: int
    requests: int
    output: int
    batch: int
    served: bool = False
    """Through a server, by so many users."""

    @property
    def is_ttft(self) -> bool:
        """One token of one prompt: its time is the time to the first token."""
        return self.output == 1

    @property
    def key(self) -> str:
        return f"{self.prompt}/{self.output} x {self.requests}{' served' if self.served else ''}"

    def work(self, vocab_size: int) -> Requests:
        """The same token ids for every engine and round."""
        return Requests.equal(self.requests, self.prompt, self.output, vocab_size)


@dataclass
class Record:
    """What became of one engine."""

    name: str
    started: Started = field(default_factory=Started)
    runs: dict[Cell, list[Run]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    """By cell, or "engine": why there is no figure."""

    @property
    def engine(self) -> Engine:
        return ENGINES[self.name]

    def takes(self, cell: Cell) -> bool:
        """Whether it is measured there: our engine alone is, beside itself through Triton."""
        return self.engine.served == cell.served or self.name == OURS

    def values(self, cell: Cell) -> list[float]:
        """One figure for each round: seconds of a TTFT cell, else output tokens per second."""
        return [run.seconds if cell.is_ttft else run.tokens_per_s for run in self.runs.get(cell, [])]

    def is_capped(self, cell: Cell) -> bool:
        return self.engine.batch is not None and cell.requests > ENOUGH_REQUESTS


def measure_round(processes: Processes, records: Sequence[Record], cells: Sequence[Cell], number: int) -> None:
    """Every cell of every engine once. Neighbours in time are what compares, so with loaded engines the engine changes
    fastest."""
    visits = list(itertools.product(cells, records))
    for cell, record in visits if processes.keep else sorted(visits, key=lambda visit: records.index(visit[1])):
        engine = record.engine
        if not record.takes(cell) or {"engine", cell.key} & set(record.failures):
            continue
        work = cell.work(processes.config["vocab_size"]).head(ENOUGH_REQUESTS if record.is_capped(cell) else None)
        try:
            record.runs.setdefault(cell, []).append(processes.run(record.name, cell.batch, work))
        except EngineError as error:
            record.failures[cell.key] = str(error)
        except (WorkerGone, NotAvailable, OSError) as error:
            record.failures["engine"] = str(error)
        record.started = processes.started.get(engine.process, record.started)
        if values := record.values(cell):
            shown = f"{values[-1] * 1000:9.1f} ms" if cell.is_ttft else f"{values[-1]:9.1f} tok/s"
            print(f"  round {number}  {cell.key:14s} {engine.title:34s} {shown}", flush=True)
        for what, reason in record.failures.items():
            print(f"  {engine.title}, {what}: FAILED: {reason}", flush=True)


def agreement(record: Record, reference: Record, cells: Iterable[Cell]) -> float | None:
    """Share of requests whose first token is the reference's; None where one does not tell its tokens.

    Random weights have near ties that bfloat16 decides by chance, so expect 0.7 or more, and nearly 0 from an engine
    that computes another model.
    """
    equal = []
    for cell in cells:
        for mine, theirs in zip(record.runs.get(cell, []), reference.runs.get(cell, []), strict=False):
            equal += [a[0] == b[0] for a, b in zip(mine.token_ids, theirs.token_ids, strict=False)]
    return statistics.fmean(equal) if equal else None


def streaming(record: Record, cell: Cell) -> dict[str, float]:
    """What users of a served engine saw over all rounds; empty where answers did not come in pieces."""
    runs = [run for run in record.runs.get(cell, []) if run.responses]
    streams = [stream for run in runs for stream in zip(run.starts, run.responses, strict=True)]
    gaps = [later[0] - earlier[0] for _, responses in streams for earlier, later in itertools.pairwise(responses)]
    if not gaps:
        return {}
    return {
        "ttft_p50_ms": 1000 * statistics.median(responses[0][0] - start for start, responses in streams),
        "gap_p50_ms": 1000 * statistics.median(gaps),
        "gap_p99_ms": 1000 * percentile(gaps, 0.99),
        "tokens_per_response_p50": statistics.median(count for _, responses in streams for _, count in responses),
    }
