"""Rounds in which every engine takes its turn, the others paused or ended."""

from __future__ import annotations

import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.machine import available_memory
from benchmarks.common.worker import Guard, Worker, WorkerError, WorkerGone
from benchmarks.compare.engines import Engine
from benchmarks.compare.environments import (
    NotAvailable,
    log_file,
    make_environment,
    prepared_model,
    python_of,
    variables_of,
)

WARM_UP_TOKENS = 8
NOISE_SHARE = 0.03  # CPU that other engines may use during a run, of one core, before it is remarked


@dataclass(frozen=True)
class Cell:
    """One thing to measure."""

    prompt: int
    requests: int
    output: int

    @property
    def is_ttft(self) -> bool:
        """One token of one prompt: its time is the time to the first token."""
        return self.output == 1

    @property
    def key(self) -> str:
        return f"{self.prompt}/{self.output} x {self.requests}"


@dataclass(frozen=True)
class Setup:
    """What is the same for all engines."""

    model: Path
    vocab_size: int
    weight_bytes: int
    kv_bytes_per_token: int
    cache: Path
    threads: int
    cells: tuple[Cell, ...]
    limit_s: float
    users: int
    """Of the served engines."""
    max_requests: int
    """That any engine computes at once."""

    def prompts(self, length: int, count: int) -> list[list[int]]:
        """The same token ids for every engine and round."""
        rng = random.Random(length)
        return [[rng.randrange(3, self.vocab_size) for _ in range(length)] for _ in range(count)]

    def work(self, engine: Engine, model: Path) -> dict[str, Any]:
        """The Workload of common/protocol.py."""
        longest = max(cell.prompt + cell.output for cell in self.cells)
        max_len = -(-(longest + 1) // 64) * 64
        kv_bytes = self.max_requests * max_len * self.kv_bytes_per_token
        return {
            "model": str(model),
            "threads": self.threads,
            "max_len": max_len,
            "max_requests": self.max_requests,
            "kv_gib": -(-kv_bytes // 2**30),
            "options": {**engine.options, **({"users": self.users} if engine.served else {})},
        }


@dataclass
class Record:
    """What became of one engine."""

    engine: Engine
    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    """From the start of its process to the first token of its first request."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    runs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By cell: the answers of the measured runs."""
    failures: dict[str, str] = field(default_factory=dict)
    """By cell, or "engine": why there is no figure."""
    remarks: list[str] = field(default_factory=list)

    def values(self, cell: Cell) -> list[float]:
        """One figure for each round: seconds of a TTFT cell, else output tokens per second."""
        runs = self.runs.get(cell.key, [])
        return [run["seconds"] if cell.is_ttft else sum(run["tokens"]) / run["seconds"] for run in runs]


class Arena:
    """The engines' processes. One runs at a time."""

    def __init__(self, setup: Setup, engines: Iterable[Engine], keep: bool | None) -> None:
        """``keep``: engines stay loaded between their turns; None: if memory allows."""
        self.setup = setup
        self.records = {engine.name: Record(engine) for engine in engines}
        self.models: dict[str, Path] = {}
        self.workers: dict[str, Worker] = {}
        self.guard = Guard()
        self.keep = self._fits() if keep is None else keep

    def _fits(self) -> bool:
        """Original and packed weights, a runtime of 0.6 GiB as was seen, and the one KV cache that is touched ahead."""
        work = self.setup.work(next(iter(self.records.values())).engine, self.setup.model)
        each = 2.5 * self.setup.weight_bytes + 0.6 * 2**30
        return each * len(self.records) + work["kv_gib"] * 2**30 < 0.8 * available_memory()

    @property
    def alive(self) -> list[Record]:
        return [record for record in self.records.values() if "engine" not in record.failures]

    def prepare(self) -> None:
        """Environments and model files of all engines; those that cannot be made are recorded as failures."""
        for record in self.records.values():
            engine = record.engine
            try:
                for name in {engine.environment, engine.preparation and engine.preparation.environment} - {None}:
                    make_environment(str(name), self.setup.cache)
                self.models[engine.name] = prepared_model(engine, self.setup.model, self.setup.cache)
            except (NotAvailable, OSError) as error:
                self._fail(record, "engine", f"not installed: {error}")

    def measure(self, rounds: int) -> Iterator[int]:
        """Run all cells of all engines in each round; yields the number of each round before it starts."""
        if self.keep:
            for record in self.alive:
                self._turn(record, functools.partial(self._warm_up, record))
        for number in range(1, rounds + 1):
            yield number
            # Neighbours in time are what compares, so with loaded engines the engine changes fastest.
            visits = (
                [(record, (cell,)) for cell in self.setup.cells for record in self.alive]
                if self.keep
                else [(record, self.setup.cells) for record in self.alive]
            )
            for record, cells in visits:
                if "engine" not in record.failures:
                    self._visit(record, cells, number)

    def _visit(self, record: Record, cells: tuple[Cell, ...], number: int) -> None:
        def action(worker: Worker) -> None:
            if not self.keep:
                self._warm_up(record, worker)
            for cell in cells:
                if cell.key not in record.failures:
                    self._run(record, worker, cell, number)

        self._turn(record, action)

    def _turn(self, record: Record, action: Callable[[Worker], None]) -> None:
        """Do it with the engine's worker, loaded and running, which is paused or ended afterwards."""
        name = record.engine.name
        try:
            if name in self.workers:
                self.workers[name].resume()
            else:
                self._load(record)
            action(self.workers[name])
        except WorkerError as error:
            self._fail(record, "engine", str(error))
        if not self.keep or "engine" in record.failures:
            self.workers.pop(name).close()
        elif record.engine.pausable:
            self.workers[name].pause()

    def _load(self, record: Record) -> None:
        """Start the engine, and anew until it has had as many starts as are to be measured."""
        engine = record.engine
        while engine.name not in self.workers:
            self._start(record)
            if len(record.first_token_s) < engine.starts:
                self.workers.pop(engine.name).close()

    def _start(self, record: Record) -> None:
        engine = record.engine
        command = [python_of(engine, self.setup.cache), "-m", f"benchmarks.compare.peers.{engine.script}"]
        started = time.perf_counter()
        worker = self.workers[engine.name] = Worker(
            command, variables_of(engine), log_file(self.setup.cache, f"run-{engine.name}"), self.guard
        )
        work = self.setup.work(engine, self.models[engine.name])
        answer = worker.ask({"op": "load", "work": work}, engine.start_timeout_s)
        record.load_s.append(time.perf_counter() - started)
        record.settings, record.versions = answer["settings"], answer["versions"]
        prompt = self.setup.prompts(self.setup.cells[0].prompt, 1)
        worker.ask({"op": "run", "prompts": prompt, "output_tokens": 1}, self.setup.limit_s)
        record.first_token_s.append(time.perf_counter() - started)
        print(f"  {engine.title}: first token {record.first_token_s[-1]:.1f} s after its start", flush=True)

    def _warm_up(self, record: Record, worker: Worker) -> None:
        """Every shape once, with few tokens."""
        for cell in self.setup.cells:
            if cell.key not in record.failures:
                self._ask(record, worker, cell, min(cell.output, WARM_UP_TOKENS))

    def _run(self, record: Record, worker: Worker, cell: Cell, number: int) -> None:
        others = [other for other in self.workers.values() if other is not worker]
        before = sum(other.cpu_seconds() for other in others)
        answer = self._ask(record, worker, cell, cell.output)
        if answer is None:
            return
        share = (sum(other.cpu_seconds() for other in others) - before) / answer["seconds"]
        if share > NOISE_SHARE:
            record.remarks.append(f"{cell.key}, round {number}: other engines used {share:.0%} of a core meanwhile")
        record.runs.setdefault(cell.key, []).append(answer)
        value = record.values(cell)[-1]
        shown = f"{value * 1000:9.1f} ms" if cell.is_ttft else f"{value:9.1f} tok/s"
        print(f"  round {number}  {cell.key:14s} {record.engine.title:34s} {shown}", flush=True)

    def _ask(self, record: Record, worker: Worker, cell: Cell, output: int) -> dict[str, Any] | None:
        """One run, or None with the failure recorded. Raises WorkerGone."""
        prompts = self.setup.prompts(cell.prompt, cell.requests)[: record.engine.most_requests]
        try:
            answer = worker.ask({"op": "run", "prompts": prompts, "output_tokens": output}, self.setup.limit_s)
            wrong = [count for count in answer["tokens"] if count != output]
            if wrong:
                raise WorkerError(f"gave {wrong[0]} tokens instead of {output}")
        except WorkerGone:
            raise
        except WorkerError as error:
            self._fail(record, cell.key, str(error))
            return None
        return answer

    def _fail(self, record: Record, what: str, reason: str) -> None:
        record.failures[what] = reason
        print(f"  {record.engine.title}, {what}: FAILED: {reason}", flush=True)

    def close(self, at_once: bool = False) -> None:
        """End all processes; ``at_once``: without waiting for what they are doing."""
        while self.workers:
            worker = self.workers.popitem()[1]
            worker.kill() if at_once else worker.close()
        self.guard.close()


def agreement(record: Record, reference: Record, cells: Iterable[Cell]) -> float | None:
    """Share of requests whose first token is the reference's; None where one does not tell its tokens.

    Random weights have near ties that bfloat16 decides by chance, so expect 0.7 or more, and nearly 0 from an engine
    that computes another model.
    """
    equal = []
    for cell in cells:
        for mine, theirs in zip(record.runs.get(cell.key, []), reference.runs.get(cell.key, []), strict=False):
            pairs = zip(mine["token_ids"], theirs["token_ids"], strict=False)
            equal += [a[0] == b[0] for a, b in pairs]
    return statistics.fmean(equal) if equal else None


@dataclass(frozen=True)
class Streaming:
    """What users of a served engine saw, over all rounds."""

    tokens_per_s: list[float]
    """One for each round."""
    ttft_p50_ms: float
    gap_p50_ms: float
    """Between two responses of one request."""
    gap_p99_ms: float
    tokens_per_response_p50: float
    tokens_in_first_response_p50: float

    @classmethod
    def of(cls, record: Record, cell: Cell) -> Streaming | None:
        runs = record.runs.get(cell.key, [])
        streams = [stream for run in runs for stream in zip(run["starts"], run["responses"], strict=True)]
        gaps = [later[0] - earlier[0] for _, responses in streams for earlier, later in itertools.pairwise(responses)]
        if len(gaps) < 2:
            return None
        return cls(
            tokens_per_s=record.values(cell),
            ttft_p50_ms=1000 * statistics.median(responses[0][0] - start for start, responses in streams),
            gap_p50_ms=1000 * statistics.median(gaps),
            gap_p99_ms=1000 * statistics.quantiles(gaps, n=100, method="inclusive")[98],
            tokens_per_response_p50=statistics.median(count for _, responses in streams for _, count in responses),
            tokens_in_first_response_p50=statistics.median(responses[0][1] for _, responses in streams),
        )
