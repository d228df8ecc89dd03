"""The supervisor with real engine processes that compute nothing, and no Triton."""

from __future__ import annotations

import base64
import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError, InternalError, Unavailable
from flashserve.ipc import supervisor as module
from flashserve.ipc.channel import LENGTH
from flashserve.ipc.supervisor import EngineSupervisor
from flashserve.protocol import (
    Abort,
    EngineLimits,
    EngineReady,
    GenerateRequest,
    ModelCard,
    SamplingParams,
    StepOutputs,
    TokenOutput,
)
from null_models import null_model, write_null_model

START_S = 30.0


class Listener:
    """Puts what it is told into queues."""

    def __init__(self) -> None:
        self.ready: queue.Queue[EngineReady] = queue.Queue()
        self.dead: queue.Queue[tuple[float, Unavailable]] = queue.Queue()
        self.outputs: queue.Queue[TokenOutput] = queue.Queue()

    def on_ready(self, ready: EngineReady) -> None:
        self.ready.put(ready)

    def on_outputs(self, message: StepOutputs) -> None:
        for output in message.outputs:
            self.outputs.put(output)

    def on_dead(self, error: Unavailable) -> None:
        self.dead.put((time.monotonic(), error))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_null_model(tmp_path_factory.mktemp("models") / "null")


Supervise = Callable[..., tuple[EngineSupervisor, Listener]]


@pytest.fixture
def supervise(folder: Path) -> Iterator[Supervise]:
    """Makes supervisors, and sees to it that nothing of them is left."""
    made: list[EngineSupervisor] = []
    before = set(psutil.Process().children())  # of other tests, such as the guard of their servers

    def make(**settings: Any) -> tuple[EngineSupervisor, Listener]:
        listener = Listener()
        config = EngineConfig.from_mapping({**null_model(folder, 5), **settings})
        made.append(EngineSupervisor(config, listener))
        return made[-1], listener

    yield make
    for one in made:
        one.stop()
    assert not set(psutil.Process().children()) - before
    assert not [thread for thread in threading.enumerate() if thread.name == "engine-supervisor"]


@pytest.fixture
def quick_engines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Stand-ins for the engine that are up in 50 ms: ``python -m flashserve.engine`` runs the given code instead."""

    def use(code: str) -> None:
        script = tmp_path / "python-stand-in"
        prelude = (
            "import os, socket, struct, sys, time\n"
            "sock = socket.socket(fileno=int(sys.argv[sys.argv.index('--fd') + 1]))\n"
        )
        script.write_text(f"#!{sys.executable} -IS\n{prelude}{code}\n")
        script.chmod(0o755)
        monkeypatch.setenv("FLASHSERVE_PYTHON", str(script))

    return use


def request(request_id: int, max_tokens: int | None = None) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return GenerateRequest(request_id, [40, 41, 42], params, arrival=time.monotonic())


def engine(supervisor: EngineSupervisor) -> psutil.Process:
    assert supervisor.pid is not None
    return psutil.Process(supervisor.pid)


def test_an_engine_that_is_stopped_while_it_loads_is_ended(quick_engines: Callable[[str], None], folder: Path) -> None:
    quick_engines("import signal; os.kill(os.getpid(), signal.SIGSTOP)")
    supervisor = EngineSupervisor(EngineConfig.from_mapping(null_model(folder)), Listener(), max_idle_s=2.0)
    with pytest.raises(InternalError, match="did not run for 2 s while it loaded the model and was ended"):
        supervisor.start()


def test_one_that_waits_and_looks_around_is_let(quick_engines: Callable[[str], None], folder: Path) -> None:
    quick_engines("for _ in range(20): time.sleep(0.2)\nsys.exit(3)")
    supervisor = EngineSupervisor(EngineConfig.from_mapping(null_model(folder)), Listener(), max_idle_s=2.0)
    with pytest.raises(InternalError, match="ended with status 3"):
        supervisor.start()


def test_from_start_to_stop(supervise: Supervise) -> None:
    supervisor, listener = supervise()
    assert supervisor.start().limits.max_model_len == 4096
    assert supervisor.ready
    supervisor.send(request(1, max_tokens=3))
    outputs = [listener.outputs.get(timeout=5) for _ in range(3)]
    assert [(output.request_id, output.finish_reason) for output in outputs] == [(1, None), (1, None), (1, "length")]

    supervisor.send(request(2))
    listener.outputs.get(timeout=5)
    supervisor.send(Abort([2]))
    while (output := listener.outputs.get(timeout=5)).finish_reason is None:
        pass
    assert (output.request_id, output.finish_reason) == (2, "abort")

    supervisor.send(request(3))
    process = engine(supervisor)
    started = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - started < 1.5
    assert not process.is_running()
    assert not supervisor.ready
    assert listener.dead.get(timeout=1)  # whoever still waits is told
    with pytest.raises(Unavailable):
        supervisor.send(request(4))
    supervisor.stop()


def test_a_killed_engine_is_reported_at_once_and_replaced(supervise: Supervise) -> None:
    supervisor, listener = supervise()
    supervisor.start()
    listener.ready.get(timeout=1)
    supervisor.send(request(1))
    listener.outputs.get(timeout=5)
    victim = engine(supervisor)

    killed = time.monotonic()
    victim.kill()
    told, error = listener.dead.get(timeout=5)
    assert told - killed < 0.5
    assert "was killed by signal 9" in error.message
    assert error.retry_after_ms > 0
    assert not supervisor.ready
    with pytest.raises(Unavailable, match="starting again"):
        supervisor.send(request(2))

    listener.ready.get(timeout=START_S)
    assert engine(supervisor) != victim
    taken_ms = (time.monotonic() - killed) * 1000
    assert error.retry_after_ms > taken_ms / 4, "the estimate covers the back-off and a start like the first one"
    while not listener.outputs.empty():  # of the first request, a step or two of it
        listener.outputs.get()
    supervisor.send(request(3, max_tokens=1))
    assert listener.outputs.get(timeout=5).request_id == 3


def test_signals_to_the_whole_group_leave_the_engine_to_its_stub(supervise: Supervise) -> None:
    supervisor, listener = supervise()
    supervisor.start()
    for number in (signal.SIGINT, signal.SIGTERM):
        engine(supervisor).send_signal(number)
    supervisor.send(request(1, max_tokens=2))
    assert listener.outputs.get(timeout=5).request_id == 1
    assert listener.dead.empty()


def test_an_engine_that_hangs_does_not_hold_up_stop(supervise: Supervise) -> None:
    supervisor, _ = supervise()
    supervisor.start()
    process = engine(supervisor)
    process.suspend()
    big = GenerateRequest(1, [40] * 3000, SamplingParams(), arrival=0.0)

    def fill() -> None:  # until the socket's buffer is full and the sender blocks
        with pytest.raises(Unavailable):
            while True:
                supervisor.send(big)

    sender = threading.Thread(target=fill)
    sender.start()
    time.sleep(0.2)
    started = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - started < 5
    sender.join(1)
    assert not sender.is_alive()
    assert not process.is_running()


def test_the_engine_ends_with_the_process_that_started_it(folder: Path) -> None:
    code = f"""
import sys, time
from flashserve.config import EngineConfig
from flashserve.ipc.supervisor import EngineSupervisor
class Listener:
    def on_ready(self, ready): pass
supervisor = EngineSupervisor(EngineConfig.from_mapping({null_model(folder, 5)!r}), Listener())
supervisor.start()
print(supervisor.pid, flush=True)
time.sleep(60)
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    process = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 2
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlives its stub"
        time.sleep(0.01)


# --- starts that fail --------------------------------------------------------------------------------------


def test_a_model_that_cannot_be_served_is_refused_with_its_reason(supervise: Supervise, tmp_path: Path) -> None:
    supervisor, _ = supervise(model=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        supervisor.start()


def test_an_engine_that_dies_while_it_loads_ends_the_start(supervise: Supervise, quick_engines: Any) -> None:
    quick_engines("os.kill(os.getpid(), 9)")
    supervisor, _ = supervise()
    with pytest.raises(InternalError, match=r"was killed by signal 9 \(out of memory\?\)"):
        supervisor.start()


def test_a_start_without_an_interpreter_says_so(supervise: Supervise, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(module.subprocess, "Popen", fail)
    supervisor, _ = supervise()
    with pytest.raises(InternalError, match=r"could not be started: .*Cannot allocate memory"):
        supervisor.start()


def test_a_start_can_be_given_up(supervise: Supervise, quick_engines: Any) -> None:
    quick_engines("time.sleep(60)")
    supervisor, _ = supervise()
    threading.Timer(0.3, supervisor.stop).start()
    started = time.monotonic()
    with pytest.raises(InternalError):
        supervisor.start()
    assert time.monotonic() - started < 3


# --- one death after the other -----------------------------------------------------------------------------

READY_THEN_DIES = """
import base64
sock.sendall(base64.b64decode({ready!r}))
sys.exit(3)
"""


def test_repeated_deaths_back_off(supervise: Supervise, quick_engines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.05)
    quick_engines(READY_THEN_DIES.format(ready=ready_message()))
    supervisor, listener = supervise()
    supervisor.start()
    deaths = [listener.dead.get(timeout=10) for _ in range(5)]
    assert "ended with status 3" in deaths[0][1].message
    pauses = [after - before for (before, _), (after, _) in itertools.pairwise(deaths)]
    for pause, minimum in zip(pauses, (0.1, 0.2, 0.4, 0.8), strict=True):
        assert minimum <= pause < minimum + 2
    retries = [error.retry_after_ms for _, error in deaths]
    assert retries == sorted(retries)


def test_a_long_life_starts_the_back_off_anew(
    supervise: Supervise, quick_engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FIRST_BACKOFF_S", 0.05)
    monkeypatch.setattr(module, "STABLE_AFTER_S", 0.0)
    quick_engines(READY_THEN_DIES.format(ready=ready_message()))
    supervisor, listener = supervise()
    supervisor.start()
    deaths = [listener.dead.get(timeout=10)[0] for _ in range(6)]
    assert deaths[-1] - deaths[0] < 5 * (0.05 + 1)


def test_an_engine_that_talks_nonsense_is_replaced(supervise: Supervise, quick_engines: Any) -> None:
    quick_engines(
        READY_THEN_DIES.format(ready=ready_message()).replace(
            "sys.exit(3)", "time.sleep(0.2); sock.sendall(struct.pack('<I', 3) + b'abc'); time.sleep(60)"
        )
    )
    supervisor, listener = supervise()
    supervisor.start()
    _, error = listener.dead.get(timeout=10)
    assert "was killed" in error.message
    listener.ready.get(timeout=10)
    listener.ready.get(timeout=10)


def ready_message() -> str:
    """An EngineReady as it goes over the wire, in base64."""
    limits = EngineLimits(4096, 8, 512, 16, 256, 512, (0,), "float32", "null")
    payload = msgspec.msgpack.encode(EngineReady(limits, ModelCard("", {}, {})))
    return base64.b64encode(LENGTH.pack(len(payload)) + payload).decode()
