"""The processes of the compared systems. One runs at a time, the others are stopped meanwhile."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.batching.workload import Workload
from benchmarks.common.protocol import Run
from benchmarks.common.shapes import ModelCost
from benchmarks.common.worker import Guard, Worker

START_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class System:
    """A line of the comparison: a process, and how it batches."""

    title: str
    process: str
    mode: str = ""
    ours: bool = False


NAIVE = "one by one"
SYSTEMS = {
    NAIVE: System("one by one", "transformers", "static"),
    "static": System("static batches", "transformers", "static"),
    "continuous": System("transformers' continuous batching", "transformers", "continuous"),
    "offline": System("flashserve", "flashserve", ours=True),
    "served": System("flashserve through Triton", "served", ours=True),
}
MAX_BATCH = 32


class Processes:
    """Starts what is needed when it is first asked."""

    def __init__(self, model: Path, max_len: int, threads: int, logs: Path) -> None:
        self.config = json.loads((model / "config.json").read_text())
        self.versions: dict[str, str] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        kv_bytes = MAX_BATCH * max_len * ModelCost.of(self.config).kv_bytes_per_token
        self._work = {
            "model": str(model),
            "threads": threads,
            "max_len": max_len,
            "max_requests": MAX_BATCH,
            "kv_gib": -(-kv_bytes // 2**30),
            "options": {},
        }
        self._logs = logs
        self._guard = Guard()
        self._workers: dict[str, Worker] = {}

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])

    def run(self, name: str, batch: int, work: Workload) -> Run:
        """Have a system do it. Raises WorkerError with the system's own error."""
        system = SYSTEMS[name]
        worker = self._worker(system.process)
        request = {"op": "run", "mode": system.mode, "batch": batch, "requests": asdict(work)}
        try:
            outcome = Run(**worker.ask(request, RUN_TIMEOUT_S))
        finally:
            self._pause(system.process)
        if outcome.tokens != work.outputs:
            raise RuntimeError(f"{system.title} gave {sum(outcome.tokens)} tokens instead of {work.total_output}")
        return outcome

    def _worker(self, process: str) -> Worker:
        if process in self._workers:
            self._workers[process].resume()
            return self._workers[process]
        print(f"  starting {process}", flush=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"batching-{process}.log"
        command = [sys.executable, "-m", "benchmarks.batching.workers", process]
        worker = self._workers[process] = Worker(command, dict(os.environ), log, self._guard)
        answer = worker.ask({"op": "load", "work": self._work}, START_TIMEOUT_S)
        self.versions |= answer["versions"]
        self.settings[process] = answer["settings"]
        return worker

    def _pause(self, process: str) -> None:
        """A server is not stopped: its launcher watches its processes, and idle it uses no core."""
        if process != "served":
            self._workers[process].pause()

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.kill() if kind else worker.close()
        self._guard.close()


def warm_up(processes: Processes, names: Sequence[str], batches: Sequence[int], prompt: int) -> None:
    """Every batch size once, with a few tokens: what is compiled or allocated at first use is not measured."""
    from benchmarks.batching.workload import equal_lengths

    for name in names:
        for batch in batches:
            if name != NAIVE or batch == 1:
                processes.run(name, batch, equal_lengths(batch, prompt, 4, processes.vocab_size))
