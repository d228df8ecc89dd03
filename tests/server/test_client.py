"""The client against a real server, over both protocols; and `flashserve generate` and `chat` on top of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flashserve_client import Client, FlashserveError, Unavailable
from harness import SOURCES, Server, wait_until
from null_models import null_model, write_null_model

PROTOCOLS = ("grpc", "http")


def address(server: Server, protocol: str) -> str:
    return f"grpc://{server.grpc}" if protocol == "grpc" else server.http


@pytest.fixture(params=PROTOCOLS)
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return address(server, request.param)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, model="letters", timeout_s=30) as client:
        yield client


def test_a_model_of_any_plain_name_answers_over_both_protocols(tmp_path: Path):
    name = "a@b+c%41=d:e,f_g-h.i"
    with Server({name: null_model(write_null_model(tmp_path / "null"))}) as server:
        for protocol in PROTOCOLS:
            with Client(address(server, protocol), model=name, timeout_s=30) as client:
                assert client.health().model_ready
                assert client.generate("hello", max_tokens=3).completion_tokens == 3
                assert "".join(delta.text for delta in client.stream("hello", max_tokens=3))
                client.load_model(name)


# --- answers ----------------------------------------------------------------------------------------------------


def test_messages_go_through_the_models_template(client: Client):
    messages = [{"role": "user", "content": "hello"}]
    chat = client.generate(messages, max_tokens=5)
    assert chat.prompt_tokens == len(client.tokenize(messages))
    assert chat.prompt_tokens > len(client.tokenize("hello"))


def test_tokenize_and_detokenize_are_inverse(client: Client):
    text = "def é():\n    return '你好 😀'"
    assert client.detokenize(client.tokenize(text)) == text


def test_health(client: Client, url: str):
    health = client.health()
    assert (health.server_live, health.model_ready, health.engine_ready, health.detail) == (True, True, True, "ok")
    health = client.health(model="missing")
    assert (health.server_live, health.model_ready, health.engine_ready) == (True, False, False)
    assert {"letters", "llama"} <= {model.name for model in client.models() if model.state == "READY"}


# --- the engine's life ------------------------------------------------------------------------------------------


def test_health_follows_the_engine_and_models_come_and_go(tmp_path):
    folder = write_null_model(tmp_path / "null")
    with Server({"m": null_model(folder, 1)}) as server, contextlib.ExitStack() as stack:
        over_grpc, over_http = clients = [
            stack.enter_context(Client(address(server, protocol), model="m")) for protocol in PROTOCOLS
        ]
        streams = [client.stream("x", max_tokens=4000, ignore_eos=True) for client in clients]
        for stream in streams:
            next(stream)
        for pid in server.engines():
            os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(Unavailable):
                list(stream)
        for client in clients:
            health = client.health()
            assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, False)
            assert "engine" in health.detail
        for client in clients:
            assert wait_until(lambda: client.health().engine_ready, 30)  # noqa: B023
            assert client.generate("x", max_tokens=1).completion_tokens == 1

        over_grpc.unload_model("m")
        for client in clients:
            assert wait_until(lambda: not client.health().model_ready, 10)  # noqa: B023
            with pytest.raises(FlashserveError):
                client.generate("x", max_tokens=1)
        over_http.load_model("m")
        for client in clients:
            assert client.generate("x", max_tokens=1).completion_tokens == 1


# --- commands ---------------------------------------------------------------------------------------------------


def flashserve(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashserve.cli", *words],
        input=text,
        env={**os.environ, "PYTHONPATH": ":".join(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_flashserve_generate(url: str):
    done = flashserve("generate", "abc", "--url", url, "--model", "letters", "--max-tokens", "5", "--stats")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 6
    assert "5 generated" in done.stderr
    done = flashserve("generate", "--url", url, "--model", "missing", text="abc")
    assert (done.returncode, done.stdout) == (1, "")
    assert "missing" in done.stderr


def test_flashserve_chat(url: str):
    done = flashserve("chat", "--url", url, "--model", "letters", "--max-tokens", "5", text="hello\nagain\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
