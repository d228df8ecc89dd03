"""The launcher with a real tritonserver and a backend that needs no engine."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness import SOURCES, Server, sse_events, wait_until
from requests_helper import stream_in_thread

STANDIN = Path(__file__).parent / "standin"


def standin(models: dict[str, dict[str, Any]], **more: Any) -> Server:
    """A server whose models stream the words of their prompt."""
    arguments = ["--backend-module", "standin_backend", *more.pop("arguments", ())]
    return Server(models, arguments=arguments, python_path=[STANDIN], **more)


def ask(server: Server, model: str = "demo", text: str = "one two three", timeout: float = 10.0) -> list[str]:
    response = httpx.post(
        f"{server.http}/v2/models/{model}/generate_stream", json={"text_input": text}, timeout=timeout
    )
    assert response.status_code == 200, response.text
    return [event["text_output"] for event in sse_events(response)]


def endless_stream(server: Server) -> None:
    """Start a stream of ten minutes."""
    stream_in_thread(server, text_input=" ".join(["word"] * 6000))


@pytest.fixture(scope="module")
def two_models() -> Iterator[Server]:
    with standin({"demo": {"delay_s": 0.1}, "other": {}}) as server:
        yield server


def test_both_models_stream_once_it_says_ready(two_models: Server) -> None:
    assert ask(two_models, "demo") == ask(two_models, "other") == ["one", "two", "three"]
    assert "ready in" in two_models.log
    assert "curl -N" in two_models.log
    assert httpx.get(two_models.metrics).status_code == 200


def test_models_lists_what_is_on_disk_and_what_the_server_says(two_models: Server) -> None:
    url = two_models.http.removeprefix("http://")
    output = flashserve("models", "--model-repository", str(two_models.repository), "--url", url).stdout
    assert "up" in output
    assert output.count("ready") == 2


def test_a_model_whose_stub_is_killed_comes_back(two_models: Server) -> None:
    (stub,) = two_models.stubs("demo")
    (bystander,) = two_models.stubs("other")
    os.kill(stub.pid, signal.SIGKILL)
    two_models.wait_for_log(r"model demo: ready again", 15)
    assert ask(two_models, "demo") == ["one", "two", "three"]
    assert two_models.stubs("demo")[0].pid != stub.pid
    assert two_models.stubs("other") == [bystander]


def test_a_model_comes_back_although_a_request_was_in_flight(two_models: Server) -> None:
    endless_stream(two_models)
    before = two_models.log.count("ready again")
    os.kill(two_models.stubs("demo")[0].pid, signal.SIGKILL)
    assert wait_until(lambda: two_models.log.count("ready again") > before, 15), two_models.log[-2000:]
    assert ask(two_models, "demo") == ["one", "two", "three"]


def test_unloading_and_loading_by_hand_is_not_taken_for_a_death(two_models: Server) -> None:
    before = two_models.log.count("died")
    two_models.unload("other")
    assert wait_until(lambda: not two_models.stubs("other"), 10)
    time.sleep(1.5)
    two_models.load("other")
    two_models.load("other")  # a reload while it is loaded: two stubs for a moment
    assert ask(two_models, "other") == ["one", "two", "three"]
    time.sleep(1.5)
    assert two_models.log.count("died") == before


def test_a_second_server_is_told_which_port_is_taken(two_models: Server) -> None:
    port = two_models.http.rsplit(":", 1)[1]
    options = ("--backend-module", "standin_backend", "--model-repository", str(two_models.repository))
    result = flashserve("serve", *options, "--http-port", port)
    assert result.returncode == 1
    assert f"port {port} is taken" in result.stderr
    assert "--http-port" in result.stderr


def test_a_model_that_cannot_load_ends_the_start_with_its_reason() -> None:
    server = standin({"good": {}, "bad": {"fail": "the moon is in the wrong phase"}})
    try:
        server.start(wait=False)
        assert server.launcher is not None
        assert server.launcher.wait(30) == 1
        assert "error: model bad could not be loaded: the moon is in the wrong phase" in server.log
        assert "model good could not" not in server.log
        server.assert_nothing_left()
    finally:
        server.destroy()


def test_a_log_line_that_is_lost_does_not_hold_up_the_start() -> None:
    """Models write into Triton's log without a lock, which may spoil "successfully loaded": here by a made-up load."""
    with standin({"demo": {"log": 'I1120 19:45:38.755263 9570 model_lifecycle.cc:472] "loading: ghost:1"'}}) as server:
        assert re.search(r"^ready in .*: demo$", server.log, re.MULTILINE), server.log


def test_a_tritonserver_that_dies_ends_the_launcher_with_an_error_if_it_is_to_start_none_anew() -> None:
    server = standin({"demo": {}}, arguments=["--max-restarts", "0"]).start()
    try:
        os.kill(server.tritonserver_pids()[0], signal.SIGKILL)
        assert server.launcher is not None
        assert server.launcher.wait(10) == 1
        assert "tritonserver ended by itself with code -9" in server.log
        server.assert_nothing_left()
    finally:
        server.destroy()


def test_model_makes_an_entry_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "My Model").mkdir()
    server = Server(
        {},
        arguments=["--backend-module", "standin_backend", "--model", str(tmp_path / "My Model")],
        python_path=[STANDIN],
    )
    with server:
        assert ask(server, "My-Model") == ["one", "two", "three"]


def flashserve(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    env = {**os.environ, "PYTHONPATH": ":".join(SOURCES)}
    return subprocess.run(
        [sys.executable, "-m", "flashserve.cli", *words], env=env, capture_output=True, text=True, timeout=60
    )


def test_doctor_finds_everything_but_a_broken_model(tmp_path: Path) -> None:
    version = tmp_path / "broken" / "1"
    version.mkdir(parents=True)
    (version / "model.json").write_text('{"model": "weights"}')
    (version.parent / "config.pbtxt").write_text('backend: "flashserve"\n')
    result = flashserve("doctor", "--model-repository", str(tmp_path))
    failed = [line for line in result.stdout.splitlines() if line.startswith("✗")]
    assert len(failed) == 1 and "weights are missing" in failed[0]
    assert result.returncode == 1

    (version / "model.json").write_text('{"model": "some/model"}')
    with socket.socket() as taken:  # a taken port is a warning: another one can be chosen
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", 8000))
            taken.listen()
        except OSError:
            pass  # taken already
        result = flashserve("doctor", "--model-repository", str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert "! port 8000" in result.stdout
    assert result.stdout.rstrip().endswith("Ready to serve.")
