"""What benchmarks/compare makes of its figures, and how the workers of comparisons end, without a model and without
torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.common.engines import NAIVE
from benchmarks.common.machine import Ceilings
from benchmarks.common.protocol import Run
from benchmarks.common.shapes import SHAPES, ModelCost
from benchmarks.common.worker import EngineError, Worker, WorkerGone
from benchmarks.compare.measure import Cell, Record, agreement, streaming
from benchmarks.compare.report import Findings, as_json, table

ROOT = Path(__file__).resolve().parents[2]
BATCH, FIRST, SERVED = Cell(16, 4, 8, 4), Cell(1000, 1, 1, 1), Cell(16, 4, 8, 2, served=True)


def batch_run(seconds: float, cell: Cell = BATCH) -> Run:
    return Run(seconds, [cell.output] * cell.requests, [[7] * cell.output] * cell.requests, [0.0] * cell.requests)


@pytest.fixture
def found() -> Findings:
    ours, vllm, naive = Record("flashserve"), Record("vllm"), Record(NAIVE)
    through_triton = Record("flashserve-served")
    ours.runs = {BATCH: [batch_run(1.0), batch_run(2.0)], FIRST: [batch_run(0.2, FIRST)], SERVED: [batch_run(1.0)]}
    vllm.runs = {BATCH: [batch_run(2.0), batch_run(3.0)], FIRST: [batch_run(0.3, FIRST)]}
    naive.failures = {"engine": "ended with status 1"}
    answers = [[(0.5, 1), (0.6, 2), (0.9, 5)]] * 4
    through_triton.runs = {SERVED: [Run(2.0, [8] * 4, starts=[0.1] * 4, responses=answers)]}
    records = {record.name: record for record in (ours, vllm, naive, through_triton)}
    machine = {"cpu": "A CPU", "cores": 2, "flags": ["avx2"], "memory_gib": 8.0}
    cost = ModelCost.of(SHAPES["smollm2-135m"])
    return Findings("smollm2-135m", machine, {}, cost, [BATCH, FIRST, SERVED], records, [Ceilings(20.0, 1.0)] * 2)


def test_engines_are_compared_with_the_best_peer_round_by_round(found: Findings) -> None:
    speedup = found.speedup(BATCH)
    assert speedup is not None and (speedup.low, speedup.median, speedup.high) == (1.5, 1.75, 2.0)
    first = found.speedup(FIRST)
    assert first is not None and first.median == pytest.approx(1.5)  # a time: less is faster
    assert agreement(found.records["flashserve"], found.records["vllm"], [BATCH]) == 1.0


def test_users_see_times_from_their_own_request_on(found: Findings) -> None:
    seen = streaming(found.records["flashserve-served"], SERVED)
    assert seen["ttft_p50_ms"] == pytest.approx(400) and seen["gap_p50_ms"] == pytest.approx(200)
    assert seen["tokens_per_response_p50"] == 2 and streaming(found.records["flashserve"], SERVED) == {}


def test_the_report_has_every_engine_and_its_failure(found: Findings) -> None:
    text = table(found)
    for words in ("24.0 (16.0-32.0)", "1.75 (1.50-2.00)", "failed", "ended with status 1", "4 requests, 2 users"):
        assert words in text
    cells = json.loads(json.dumps(as_json(found), allow_nan=False))["cells"]
    assert [cell["best_peer"] for cell in cells] == ["vllm", "vllm", None]
    assert cells[0]["rounds"]["flashserve"] == [32.0, 16.0]


ECHO = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "quit" or request["op"] == "die":
        break
    print(json.dumps({"error": "no such thing"} if request["op"] == "fail" else request), flush=True)
"""


def test_a_worker_answers_fails_and_is_gone(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", ECHO], dict(os.environ), tmp_path / "log")
    worker.pause()
    worker.resume()
    assert worker.ask({"op": "run"}, 60)["op"] == "run"
    with pytest.raises(EngineError, match="no such thing"):
        worker.ask({"op": "fail"}, 60)
    with pytest.raises(WorkerGone, match="status 0"):
        worker.ask({"op": "die"}, 60)
    worker.close()


def test_workers_end_with_a_benchmark_that_is_killed(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from benchmarks.common.worker import Worker
workers = [Worker([sys.executable, "-c", {ECHO!r}], dict(os.environ), Path({str(tmp_path)!r}, str(i))) for i in "12"]
for worker in workers:
    worker.ask({{"op": "run"}}, 60)
workers[0].pause()
print(*(worker.process.pid for worker in workers), flush=True)
os.kill(os.getpid(), 9)
"""
    # In a session of its own, whose leader lives on: that is what a shell is.
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {program!r}])"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, start_new_session=True, timeout=60)
    pids = list(map(int, done.stdout.split()))
    assert len(pids) == 2, done.stderr
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
