"""A deadline holds whoever keeps it, and an engine that lives but makes no step is reported, then started anew."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from flashserve.config import EngineConfig
from flashserve.errors import Unavailable
from flashserve.frontend import engine_watch
from flashserve.frontend.engine_watch import EngineWatch
from flashserve.frontend.metrics import Metrics
from flashserve.ipc.supervisor import EngineSupervisor
from flashserve.protocol import GenerateRequest, SamplingParams
from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model

TIMEOUT_MS = 1000
BOUND_S = 20.0  # a stopped engine would answer never


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server({"demo": null_model(write_null_model(tmp_path / "null"), 5)}) as server:
        yield server


def ask(server: Server, kind: str, **parameters: Any) -> httpx.Response:
    parameters = {"max_tokens": 3000, "ignore_eos": True, **parameters}
    body = {"text_input": "hello", "stream": kind == "generate_stream", "sampling_parameters": json.dumps(parameters)}
    return HTTP.post(f"{server.http}/v2/models/demo/{kind}", json=body, timeout=BOUND_S)


def test_a_request_to_a_stopped_engine_ends_at_its_deadline(server: Server) -> None:
    (engine,) = server.engines()
    process = psutil.Process(engine)
    process.suspend()
    try:
        for kind in ("generate", "generate_stream"):
            answer = ask(server, kind, timeout_ms=TIMEOUT_MS)
            assert "deadline has passed [code=CANCELLED reason=deadline]" in answer.text
        stalled = {"model": "demo"}
        assert wait_until(lambda: server.metric("flashserve:engine_stalled", **stalled) == 1, 30)
        assert "has work but has made no step for 10 s" in server.log
    finally:
        process.resume()
    assert wait_until(lambda: server.metric("flashserve:engine_stalled", **stalled) == 0, 10)
    assert ask(server, "generate", max_tokens=3).status_code == 200
    assert server.metric("flashserve:engine_restarts_total", **stalled) == 0


# --- the restart, with an engine but without a server -----------------------------------------------------------


class Listener:
    def __init__(self) -> None:
        self.dead: list[Unavailable] = []
        self.ready = 0

    def on_ready(self, ready: Any) -> None:
        self.ready += 1

    def on_outputs(self, message: Any) -> None: ...

    def on_dead(self, error: Unavailable) -> None:
        self.dead.append(error)


def test_an_engine_without_a_step_is_started_anew(tmp_path: Path) -> None:
    config = EngineConfig(model=str(write_null_model(tmp_path / "null")), device="null:5", num_threads=1)
    listener, metrics = Listener(), Metrics()
    supervisor = EngineSupervisor(config, listener)
    nobody: Any = SimpleNamespace(open_requests=[])
    watch = EngineWatch(nobody, supervisor, metrics, report_s=1.0, restart_s=2.0)
    try:
        supervisor.start()
        watch.start()
        time.sleep(3.0)
        assert supervisor.silent_s == 0 and not listener.dead  # without work an engine owes nothing
        assert supervisor.pid is not None
        before = psutil.Process(supervisor.pid)
        before.send_signal(signal.SIGSTOP)
        supervisor.send(GenerateRequest(1, [5, 6], SamplingParams(max_tokens=3), time.monotonic()))
        assert wait_until(lambda: listener.ready == 2, 60)
        assert "the engine process made no step for" in listener.dead[0].message
        assert supervisor.pid != before.pid
    finally:
        watch.stop()
        supervisor.stop()


def test_an_engine_that_computes_is_let_go_on_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a step of a long prompt may take minutes; it uses the processor all the while."""
    reasons: list[str] = []
    engine: Any = SimpleNamespace(pid=1, silent_s=0.0, restart=reasons.append)
    nobody: Any = SimpleNamespace(open_requests=[])
    watch = EngineWatch(nobody, engine, Metrics())
    used = 100.0
    monkeypatch.setattr(engine_watch, "processor_seconds", lambda pid: used)
    for second in range(1, 1900):
        engine.silent_s = float(second - 1)
        used += 0.5
        watch._look_at_engine()
        if reasons:
            break
    assert reasons == ["made no step for 1800 s and was ended"]
