"""The launcher's promises with real engine processes: in mid-stream, and when stubs or the launcher are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import Server, wait_until
from requests_helper import stream_in_thread
from tiny_models import make_tiny_model

LONG = {"text_input": "def f(x):", "stream": True, "sampling_parameters": '{"max_tokens": 2000, "ignore_eos": true}'}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("weights") / "llama")


@pytest.fixture
def streaming(model: Path) -> Iterator[Server]:
    """In the middle of 2,000 tokens at 20 tokens per second."""
    server = Server({"demo": {"model": str(model), "device": "null:50"}}).start()
    try:
        stream_in_thread(server, **LONG)
        yield server
    finally:
        server.destroy()


def test_the_stub_ends_its_streams_before_the_launcher_must_use_force(streaming: Server) -> None:
    assert len(streaming.engines()) == 1
    time.sleep(1.5)  # the stub must have seen its model ready
    assert streaming.stop() <= 10
    assert "the rest was killed" not in streaming.log
    streaming.assert_nothing_left(within_s=0.5)


def test_nothing_is_left_when_the_launcher_is_killed_in_mid_stream(streaming: Server) -> None:
    assert streaming.launcher is not None
    streaming.launcher.kill()
    streaming.launcher.wait(5)
    streaming.assert_nothing_left(within_s=12)


def test_a_killed_stub_takes_its_engine_along_and_the_model_comes_back(streaming: Server) -> None:
    before = streaming.engines()
    os.kill(streaming.stubs("demo")[0].pid, signal.SIGKILL)
    streaming.wait_for_log(r"model demo: ready again", 30)
    assert wait_until(lambda: len(streaming.engines()) == 1, 5)
    assert streaming.engines() != before
    stream_in_thread(streaming, **LONG)
