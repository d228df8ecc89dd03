"""A process is healthy when it answers, not when it exists: what died, hangs or waits for ever is started anew."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_launcher import ask, standin

from flashserve import progress
from flashserve.launcher import health, stubs
from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.health import HealthWatch
from flashserve.launcher.restarts import Restarts
from flashserve.launcher.stubs import FrozenStubs, LoadWatch
from flashserve.progress import Progress
from flashserve.stub_processes import Stub
from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model

ANEW = "started anew with the models that it had"
AGAIN_TIMEOUT_S = 60.0


@pytest.fixture
def two_models() -> Iterator[Server]:
    server = standin({"demo": {}, "other": {}}, arguments=["--max-restarts", "1", "--answer-timeout", "3"])
    try:
        yield server.start()
    finally:
        server.destroy()


def wait_for_the_next(server: Server, before: int) -> None:
    """Until another tritonserver is ready."""

    def is_ready() -> bool:
        return server.log.count("ready in") == 2 and server.tritonserver_pids() not in ([], [before])

    assert wait_until(is_ready, AGAIN_TIMEOUT_S), server.log[-4000:]


def ready_models(server: Server) -> list[str]:
    rows = HTTP.post(f"{server.http}/v2/repository/index", json={}, timeout=10).json()
    return [row["name"] for row in rows if row.get("state") == "READY"]


def test_a_tritonserver_that_died_comes_back_with_its_models_until_that_helps_no_more(two_models: Server) -> None:
    server = two_models
    server.unload("other")
    assert wait_until(lambda: not server.stubs("other"), 20)
    asked = server.log.count("ended by itself")
    (before,) = server.tritonserver_pids()
    assert wait_until(lambda: ready_models(server) == ["demo"], 20)
    wait_until(lambda: False, health.ASK_PERIOD_S + 1)  # the launcher has asked since
    os.kill(before, signal.SIGABRT)
    wait_for_the_next(server, before)
    assert "tritonserver ended by itself with code -6" in server.log[asked:] and ANEW in server.log
    assert ready_models(server) == ["demo"]
    assert ask(server) == ["one", "two", "three"]

    os.kill(server.tritonserver_pids()[0], signal.SIGKILL)
    assert server.launcher is not None and server.launcher.wait(30) == 1
    assert "ended by itself with code -9, and starting it anew did not help 1 times (--max-restarts 1)" in server.log
    server.assert_nothing_left()


@pytest.mark.slow
def test_a_tritonserver_that_does_not_answer_is_started_anew(two_models: Server) -> None:
    (before,) = two_models.tritonserver_pids()
    os.kill(before, signal.SIGSTOP)
    wait_for_the_next(two_models, before)
    assert "tritonserver exists, but has not answered for" in two_models.log
    assert ready_models(two_models) == ["demo", "other"]
    assert ask(two_models, "other") == ["one", "two", "three"]
    assert two_models.stop() <= 10
    two_models.assert_nothing_left()


@pytest.mark.slow
def test_a_stub_killed_while_its_model_loads_does_not_hold_up_the_start_for_ever() -> None:
    server = standin({"demo": {}})
    try:
        server.start(wait=False)
        assert wait_until(lambda: bool(server.stubs("demo")), 30, poll_s=0.005)
        os.kill(server.stubs("demo")[0].pid, signal.SIGKILL)  # the one that completes the configuration
        server.wait_ready()
        assert re.search("model demo cannot become ready: (its process died|it has no process)", server.log)
        assert ask(server) == ["one", "two", "three"]
        server.stop()
        server.assert_nothing_left()
    finally:
        server.destroy()


def test_a_stub_that_does_not_run_is_ended_and_its_model_comes_back(two_models: Server) -> None:
    (stub,) = two_models.stubs("demo")
    (bystander,) = two_models.stubs("other")
    os.kill(stub.pid, signal.SIGSTOP)
    two_models.wait_for_log(f"the backend process {stub.pid} of model demo does not run: it is ended", 30)
    two_models.wait_for_log("model demo: ready again", 60)
    assert ask(two_models) == ["one", "two", "three"]
    assert two_models.stubs("other") == [bystander]  # which had nothing to do, and yet ran


@pytest.mark.slow
def test_nor_does_one_that_is_stopped_while_its_model_loads_hold_up_the_start() -> None:
    server = standin({"demo": {"load_s": 3}}, arguments=["--answer-timeout", "3"])
    try:
        server.start(wait=False)
        assert wait_until(lambda: any(stub.instance == "demo_0" for stub in server.stubs("demo")), 30, poll_s=0.01)
        (stub,) = server.stubs("demo")
        os.kill(stub.pid, signal.SIGSTOP)
        server.wait_ready()
        assert f"the backend process {stub.pid} of model demo does not run: it is ended" in server.log
        assert ask(server) == ["one", "two", "three"]
        server.stop()
        server.assert_nothing_left()
    finally:
        server.destroy()


def test_models_of_any_plain_name_are_watched(tmp_path: Path) -> None:
    """Triton does not decode paths, so that a quoted name is another one; one of them once ended the watch for all."""
    model = null_model(write_null_model(tmp_path / "null"))
    with Server({"模型": model, "a@b+c": model}) as server:
        os.kill(server.stubs("模型")[0].pid, signal.SIGKILL)
        server.wait_for_log("model 模型: ready again", 60)
        assert server.stop() <= 10
        assert "the rest was killed" not in server.log


# --- when a load counts as one that cannot end ------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def looks(watch: LoadWatch, clock: Clock, loading: Collection[str], seconds: int) -> list[str | None]:
    found = []
    for _ in range(seconds):
        clock.now += 1
        found.append(watch.stuck(loading))
    return found


@pytest.fixture
def living(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    found: list[Stub] = []
    monkeypatch.setattr(stubs, "list_stubs", lambda server: list(found))
    return found


def test_a_load_goes_on_while_a_stub_lives_and_from_one_stub_to_the_next(living: list[Stub]) -> None:
    clock = Clock()
    watch = LoadWatch(1, ["a"], clock)
    living.append(Stub(5, "/r/a/1/model.py", "a"))
    assert looks(watch, clock, ["a"], 1000) == [None] * 1000
    living.clear()
    assert looks(watch, clock, ["a"], 9) == [None] * 9
    living.append(Stub(6, "/r/a/1/model.py", "a_0"))
    assert looks(watch, clock, ["a"], 100) == [None] * 100
    living.clear()
    assert str(looks(watch, clock, ["a"], 11)[-1]).startswith("model a cannot become ready: its process died")


def test_a_load_without_any_stub_ends_where_one_is_needed(living: list[Stub]) -> None:
    clock = Clock()
    watch = LoadWatch(1, ["a"], clock)
    assert looks(watch, clock, ["onnx"], 1000) == [None] * 1000
    assert str(looks(watch, clock, ["a"], 22)[-1]).startswith("model a cannot become ready: it has no process")


def test_a_load_may_wait_for_others(living: list[Stub]) -> None:
    clock = Clock()
    watch = LoadWatch(1, ["a", "b"], clock)
    living.append(Stub(5, "/r/b/1/model.py", "b_0"))
    assert looks(watch, clock, ["a", "b"], 1000) == [None] * 1000


def test_a_model_that_became_ready_starts_anew_when_it_loads_again(living: list[Stub]) -> None:
    clock = Clock()
    watch = LoadWatch(1, ["a"], clock)
    living.append(Stub(5, "/r/a/1/model.py", "a"))
    looks(watch, clock, ["a"], 5)
    living.clear()
    looks(watch, clock, [], 100)
    assert looks(watch, clock, ["a"], 15) == [None] * 15


# --- when stillness counts as death -----------------------------------------------------------------------------


PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import os, time\\nwhile os.getppid() != 1: time.sleep(0.05)"])
print("ready", flush=True)
while True:
    time.sleep(0.05)
"""


def test_a_process_that_was_stopped_is_still_while_its_child_runs() -> None:
    """The engine of a stopped stub goes on."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        alone, both = Progress(process.pid), Progress(process.pid, with_children=True)
        assert not wait_until(lambda: alone.idle_s() > 1 or both.idle_s() > 1, 2, poll_s=0.5)
        process.send_signal(signal.SIGSTOP)
        assert wait_until(lambda: alone.idle_s() > 1, 10, poll_s=0.5)
        assert both.idle_s() < 1
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("look_every_s", "looks", "limit_s", "ends"),
    [(1, 59, 60, False), (1, 62, 60, True), (1, 1000, 0, False), (300, 20, 60, False)],
    ids=["not yet", "over the limit", "never", "nobody looked meanwhile, as in a paused container"],
)
def test_stillness_counts_after_its_limit(
    living: list[Stub], monkeypatch: pytest.MonkeyPatch, look_every_s: int, looks: int, limit_s: float, ends: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "_ran", lambda pid, with_children: ["1000"])
    living.append(Stub(5, "/r/a/1/model.py", "a_0"))
    frozen = FrozenStubs(1, limit_s, clock)
    found = []
    for _ in range(looks):
        clock.now += look_every_s
        found += frozen.find()
    assert bool(found) == ends


# --- when silence counts as death -------------------------------------------------------------------------------


class Silent(TritonControl):
    """Answers nothing, or all but the models' list."""

    def __init__(self, answers: bool) -> None:
        super().__init__("nowhere:0")
        self._answers = answers

    def index(self) -> list[dict[str, str]]:
        raise ControlError("no answer")

    def answers(self, path: str) -> bool:
        return self._answers


@pytest.mark.parametrize(
    ("metrics_answer", "limit_s", "dead_after"),
    [(False, 60.0, 61), (True, 60.0, 601), (False, 0.0, None)],
    ids=["nothing answers", "metrics answer", "never"],
)
def test_silence_counts_as_death_after_its_limit(
    monkeypatch: pytest.MonkeyPatch, metrics_answer: bool, limit_s: float, dead_after: int | None
) -> None:
    """Eight loads at once occupy every HTTP thread of a healthy tritonserver, but not that of its metrics."""
    clock = Clock()
    monkeypatch.setattr(health.time, "monotonic", clock)
    unused: Any = None
    silent = Silent(metrics_answer)
    watch = HealthWatch(silent, silent, unused, unused, unused, ["a"], limit_s)
    found = None
    while found is None and clock.now < 700:
        clock.now += 1
        watch._ask()
        found = clock.now if watch.failure is not None else None
    assert found == dead_after


def test_failures_that_come_close_together_end_it_and_rare_ones_do_not() -> None:
    close = Restarts(3)
    assert [close.pause_s(1.0) for _ in range(4)] == [0.5, 2.0, 5.0, None]
    rare = Restarts(1)
    assert [rare.pause_s(3600.0) for _ in range(4)] == [0.5] * 4


def test_a_model_that_cannot_load_any_more_does_not_keep_the_others_down() -> None:
    restarts = Restarts(5)
    assert restarts.given_up({"a": "no weights"}) == []
    assert restarts.given_up({}) == []  # it was something else
    assert [restarts.given_up({"a": "no weights"}) for _ in range(2)] == [[], ["a"]]
