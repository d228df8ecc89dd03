"""The gateway as the launcher's child: what is checked before it starts, and what happens when it does not stay."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flashserve.launcher import gateway
from flashserve.launcher.console import Console
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.gateway import GatewayChild
from flashserve.launcher.ports import Endpoints
from flashserve_gateway.server import CannotListen, _listen

ENDPOINTS = Endpoints("127.0.0.1", 1, 2, 3, 4)


class Broken(io.StringIO):
    """The launcher's output when nobody takes it any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def child(code: str, stream: io.StringIO) -> GatewayChild:
    """One that runs `code` in the gateway's place."""
    made = GatewayChild(ENDPOINTS, None, Console(stream))
    made._command = [sys.executable, "-c", code]
    return made


@pytest.mark.parametrize(("content", "words"), [(None, "No such file"), ("{", "keys.json"), ("[]", "at least one")])
def test_a_keys_file_that_cannot_be_used_is_told_before_anything_starts(
    tmp_path: Path, content: str | None, words: str
) -> None:
    path = tmp_path / "keys.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LauncherError, match=words) as raised:
        GatewayChild(ENDPOINTS, str(path), Console(io.StringIO()))
    assert "--gateway-keys" in str(raised.value)


def test_one_that_never_serves_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BACKOFF_S", (0.01, 0.01, 0.01))
    shown = io.StringIO()
    made = child("print('port 4 is taken'); raise SystemExit(1)", shown)
    made.start()
    made._thread.join(20)
    assert not made._thread.is_alive()
    assert shown.getvalue().count("port 4 is taken") == 3
    assert "given up" in shown.getvalue() and "→" in shown.getvalue()
    made.start()  # as at tritonserver's next restart
    made.ask_to_end()
    made.wait()


def test_a_process_that_cannot_be_made_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "BACKOFF_S", (0.01,) * 5)
    runs, made = [], child("print('up')", io.StringIO())
    has_run = threading.Event()
    popen = made._popen

    def fragile() -> subprocess.Popen[str]:
        runs.append(None)
        if len(runs) < 3:
            raise OSError(12, "Cannot allocate memory")
        has_run.set()
        return popen()

    monkeypatch.setattr(made, "_popen", fragile)
    made.start()
    assert has_run.wait(20)
    made.ask_to_end()
    made.wait()


def test_it_is_read_on_when_the_launchers_output_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gateway, "BACKOFF_S", (0.01, 0.01))
    done = tmp_path / "done"
    made = child(f"print('x' * 1_000_000, flush=True); open({str(done)!r}, 'a').write('.')", Broken())
    made.start()
    made._thread.join(20)
    assert done.read_text() == ".."


def test_of_two_that_listen_on_a_port_one_is_told() -> None:
    with _listen("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(CannotListen, match=str(port)):
            _listen("127.0.0.1", port)
        with socket.create_connection(("127.0.0.1", port), 5):  # waits until it is served
            pass
