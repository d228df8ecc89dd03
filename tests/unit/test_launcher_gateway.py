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
from flashserve.launcher.gateway import GatewayChild, GatewayOptions
from flashserve.launcher.ports import Endpoints
from flashserve_gateway.server import CannotListen, _listen

ENDPOINTS = Endpoints("127.0.0.1", 1, 2, 3, 4)


class Broken(io.StringIO):
    """The launcher's output when nobody takes it any more."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def child(code: str, stream: io.StringIO) -> GatewayChild:
    """One that runs `code` in the gateway's place."""
    made = GatewayChild(ENDPOINTS, GatewayOptions(), Console(stream))
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
        GatewayChild(ENDPOINTS, GatewayOptions(keys=str(path)), Console(io.StringIO()))
    assert "--gateway-keys" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (GatewayOptions(redis="http://localhost"), r"--gateway-redis: a URL is redis://HOST"),
        (GatewayOptions(queue_wait="-1"), r"--gateway-queue-wait: seconds, 0 or more"),
        (GatewayOptions(cache_answers="soon"), r"--gateway-cache-answers: .*'soon'"),
    ],
)
def test_options_that_it_refuses_are_told_under_their_names_here(options: GatewayOptions, words: str) -> None:
    with pytest.raises(LauncherError, match=words):
        GatewayChild(ENDPOINTS, options, Console(io.StringIO()))


def test_options_are_passed_on(tmp_path: Path) -> None:
    options = GatewayOptions(redis="redis://host/1", cache_answers="60", data_dir=str(tmp_path), queue_wait="0")
    command = GatewayChild(ENDPOINTS, options, Console(io.StringIO()))._command
    assert command[-4:] == ["--redis=redis://host/1", "--cache-answers=60", f"--data-dir={tmp_path}", "--queue-wait=0"]


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
