"""How an unload or a shutdown is recognised from what Triton's HTTP endpoint answers, and what is not taken for one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from flashserve.errors import FlashserveError
from flashserve.frontend import drain as module
from flashserve.frontend.drain import DrainWatcher, address_of


class Endpoint:
    """Answers /ready: with a status, or, for "reset", by closing the connection. First ``script``, then ``answer``."""

    def __init__(self) -> None:
        self.answer: int | str = 200
        self.script: list[int | str] = []
        self.paths: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.paths.append(connection.recv(4096).split()[1].decode())
                answer = self.script.pop(0) if self.script else self.answer
                if isinstance(answer, int):
                    connection.sendall(f"HTTP/1.1 {answer} X\r\nContent-Length: 0\r\n\r\n".encode())

    def polled(self, times: int) -> None:
        """Wait for so many further polls."""
        target = len(self.paths) + times
        deadline = time.monotonic() + 5
        while len(self.paths) < target:
            assert time.monotonic() < deadline
            time.sleep(0.002)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the test may have closed it
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Responder:
    """What the watcher calls."""

    def __init__(self) -> None:
        self.open_requests: list[object] = []
        self.refusal: FlashserveError | None = None
        self.failure: FlashserveError | None = None

    def refuse_new(self, error: FlashserveError) -> None:
        self.refusal = error

    def fail_all(self, error: FlashserveError) -> None:
        self.failure = error
        self.open_requests = []


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.setattr(module, "POLL_S", 0.02)
    monkeypatch.setattr(module, "READY_POLL_S", 0.02)
    endpoint, responder, stopped, exited = Endpoint(), Responder(), threading.Event(), threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda status: exited.set())
    watcher = DrainWatcher("my@模型", "1", endpoint.address, 0.1, responder, stopped.set)  # type: ignore[arg-type]
    yield SimpleNamespace(
        endpoint=endpoint, responder=responder, engine_stopped=stopped, exited=exited, watcher=watcher
    )
    watcher.stop()
    endpoint.close()


def drained(rig: SimpleNamespace) -> bool:
    return bool(rig.engine_stopped.wait(1))


@pytest.mark.parametrize("end", [400, 404, "reset", "refused"])
def test_a_model_that_was_ready_and_is_not_any_more_is_drained(rig: SimpleNamespace, end: int | str) -> None:
    rig.watcher.start()
    rig.endpoint.polled(2)
    assert rig.endpoint.paths[0] == "/v2/models/my@模型/versions/1/ready"
    if end == "refused":
        rig.endpoint.close()
    rig.endpoint.answer = end
    assert drained(rig)
    assert rig.responder.refusal.code == "UNAVAILABLE"
    assert rig.responder.failure.code == "CANCELLED"


def test_open_requests_get_their_time_and_no_more(rig: SimpleNamespace) -> None:
    rig.responder.open_requests = [object()]
    rig.watcher.start()
    rig.endpoint.polled(2)
    rig.endpoint.answer = 400
    started = time.monotonic()
    assert drained(rig)
    assert 0.1 <= time.monotonic() - started < 0.8
    assert not rig.responder.open_requests


@pytest.mark.parametrize("answer", [400, "reset"])
def test_a_model_that_is_still_loading_is_not_drained(rig: SimpleNamespace, answer: int | str) -> None:
    rig.endpoint.answer = answer
    rig.watcher.start()
    rig.endpoint.polled(5)
    assert rig.responder.refusal is None


@pytest.mark.parametrize("answer", [500, 503, 403])
def test_answers_that_say_nothing_of_the_model_are_no_end(rig: SimpleNamespace, answer: int) -> None:
    rig.watcher.start()
    rig.endpoint.polled(2)
    rig.endpoint.answer = answer
    rig.endpoint.polled(5)
    assert rig.responder.refusal is None


def test_one_bad_answer_is_no_end(rig: SimpleNamespace) -> None:
    rig.watcher.start()
    rig.endpoint.polled(2)
    rig.endpoint.script = [400, 200, 200, 400, 200, 400, 200]
    rig.endpoint.polled(9)
    assert rig.responder.refusal is None


def test_a_port_shortage_is_no_end(rig: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.watcher.start()
    rig.endpoint.polled(2)
    asked = threading.Semaphore(0)

    def no_port(*_: object, **__: object) -> socket.socket:
        asked.release()
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(module.http.client.socket, "create_connection", no_port)
    assert all(asked.acquire(timeout=5) for _ in range(5))
    assert rig.responder.refusal is None


def test_a_model_that_is_never_finalized_ends_its_process(
    rig: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FINALIZE_TIMEOUT_S", 0.1)
    rig.watcher.start()
    rig.endpoint.polled(2)
    rig.endpoint.answer = 400
    assert rig.exited.wait(2)


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ([], "localhost:8000"),
        (["--http-port", "9000"], "localhost:9000"),
        (["--http-port=9000", "--http-address=10.0.0.5"], "10.0.0.5:9000"),
        (["--http-address", "0.0.0.0", "--log-verbose=1"], "localhost:8000"),
    ],
)
def test_the_endpoint_is_that_of_the_own_tritonserver(options: list[str], address: str) -> None:
    command = [sys.executable, "-c", "print(flush=True); input()", *options]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # until then the kernel may not show its command line
        assert address_of(process.pid) == address
    finally:
        process.communicate(b"\n")
