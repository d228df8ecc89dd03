"""The processes of the compared engines, which take turns: one runs, the others are paused or ended meanwhile."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.engines import ENGINES, Engine
from benchmarks.common.environments import (
    NotAvailable,
    command_of,
    log_file,
    make_environments,
    prepared_model,
    variables_of,
)
from benchmarks.common.protocol import EngineSetup, Requests, Run
from benchmarks.common.shapes import ModelCost
from benchmarks.common.worker import EngineError, Worker, WorkerGone

WARM_UP_TOKENS = 8
RUN_TIMEOUT_S = 900.0


@dataclass
class Started:
    """What became of the starts of one engine's process."""

    load_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    """From the start of its process to the first token of its first request."""
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


def fit_together(cost: ModelCost, engines: int) -> bool:
    """Whether memory holds so many engines: original and packed weights, caches, and a runtime, as was seen."""
    return engines * (2.5 * cost.weight_bytes + 2**30) < 0.8 * psutil.virtual_memory().available


class Processes:
    """Starts an engine when it is first asked, and warms it up: what is compiled or allocated at first use is not
    measured."""

    def __init__(
        self,
        model: Path,
        cache: Path,
        work: Sequence[tuple[int, Requests]],
        *,
        threads: int,
        keep: bool = True,
    ) -> None:
        """work: every batch with requests of the lengths that will be asked for; an engine runs them once, with few
        tokens, before it is measured. keep: whether engines stay loaded while others run."""
        self.config = json.loads((model / "config.json").read_text())
        self.started: dict[str, Started] = {}
        cost = ModelCost.of(self.config)
        longest = max(each.longest for _, each in work)
        max_len, max_requests = -(-(longest + 1) // 64) * 64, max(batch for batch, _ in work)
        kv_gib = -(-max_requests * max_len * cost.kv_bytes_per_token // 2**30)
        self._setup = EngineSetup(str(model), threads, max_len, max_requests, kv_gib, {})
        self.keep = keep
        self._warm_up = [(batch, each.at_most(WARM_UP_TOKENS)) for batch, each in work]
        self._cache = cache
        self._workers: dict[str, Worker] = {}
        self._warm: set[str] = set()
        self._current = ""
        """The worker that is neither paused nor ended."""

    def run(self, name: str, batch: int, requests: Requests) -> Run:
        """Have an engine do it. Raises WorkerError, or NotAvailable if it cannot be had."""
        engine = ENGINES[name]
        try:
            worker = self._take_turn(engine)
            if name not in self._warm:
                self._warm.add(name)
                for size, short in self._warm_up:
                    with contextlib.suppress(EngineError):  # the measured run will say so
                        self._ask(worker, engine, size, short.head(engine.batch))
            run = self._ask(worker, engine, batch, requests)
        except WorkerGone:
            self._workers.pop(engine.process, None)
            raise
        if run.tokens != requests.outputs:
            raise EngineError(f"gave {sum(run.tokens)} tokens instead of {sum(requests.outputs)}")
        return run

    def rest(self) -> None:
        """Pause, or end, the engine that ran last."""
        worker = self._workers.get(self._current)
        if worker is None:
            return
        if not self.keep:
            self._workers.pop(self._current).close()
            self._warm -= {name for name, engine in ENGINES.items() if engine.process == self._current}
        elif all(engine.pausable for engine in ENGINES.values() if engine.process == self._current):
            worker.pause()
        self._current = ""

    def _take_turn(self, engine: Engine) -> Worker:
        if self._current != engine.process:
            self.rest()
        self._current = engine.process
        if engine.process not in self._workers:
            return self._start(engine)
        self._workers[engine.process].resume()
        return self._workers[engine.process]

    def _start(self, engine: Engine) -> Worker:
        make_environments(engine, self._cache)
        model = prepared_model(engine, Path(self._setup.model), self._cache)
        print(f"  starting {engine.process}", flush=True)
        begun = time.perf_counter()
        log = log_file(self._cache, f"run-{engine.process}")
        worker = self._workers[engine.process] = Worker(command_of(engine, self._cache), variables_of(engine), log)
        setup = {**asdict(self._setup), "model": str(model), "options": dict(engine.options)}
        try:
            answer = worker.ask({"op": "load", "setup": setup}, engine.start_timeout_s)
        except EngineError as error:
            self._workers.pop(engine.process).kill()
            raise NotAvailable(str(error)) from None
        found = self.started.setdefault(engine.process, Started())
        found.settings, found.versions = answer["settings"], answer["versions"]
        found.load_s.append(time.perf_counter() - begun)
        self._ask(worker, engine, 1, self._warm_up[0][1].head(1).at_most(1))
        found.first_token_s.append(time.perf_counter() - begun)
        return worker

    def _ask(self, worker: Worker, engine: Engine, batch: int, requests: Requests) -> Run:
        request = {"op": "run", "mode": engine.mode, "batch": engine.batch or batch, "requests": asdict(requests)}
        return Run(**worker.ask(request, RUN_TIMEOUT_S))

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """End all processes; after an error without waiting for what they are doing."""
        for worker in self._workers.values():
            worker.kill() if kind else worker.close()
