"""However a server ends, it ends in time and leaves nothing: no process, no shared memory, no file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from test_launcher import endless_stream, standin

from harness import Server, wait_until


@pytest.fixture
def streaming() -> Iterator[Server]:
    """A server in the middle of a stream that would take ten minutes and that nothing but force ends."""
    server = standin({"demo": {"delay_s": 0.1}}).start()
    try:
        endless_stream(server)
        yield server
    finally:
        server.destroy()


def test_sigterm_in_mid_stream_ends_within_ten_seconds(streaming: Server) -> None:
    seconds = streaming.stop()
    assert seconds <= 10
    assert streaming.launcher is not None and streaming.launcher.returncode == 0
    streaming.assert_nothing_left(within_s=0.5)


def test_a_second_ctrl_c_ends_at_once(streaming: Server) -> None:
    assert streaming.launcher is not None
    streaming.launcher.send_signal(signal.SIGINT)
    time.sleep(1)
    started = time.monotonic()
    streaming.launcher.send_signal(signal.SIGINT)
    assert streaming.launcher.wait(3) == 0
    assert time.monotonic() - started <= 2
    streaming.assert_nothing_left(within_s=0.5)


def test_the_same_ctrl_c_twice_is_no_hurry(streaming: Server) -> None:
    assert streaming.launcher is not None
    for _ in range(3):  # from the terminal, from make, from timeout
        streaming.launcher.send_signal(signal.SIGINT)
    time.sleep(2)
    assert streaming.launcher.poll() is None


def test_nothing_is_left_when_the_launcher_is_killed_while_models_load() -> None:
    server = standin({"demo": {"load_s": 600}})
    try:
        server.start(wait=False)
        assert wait_until(lambda: bool(server.stubs()), 20)
        assert server.launcher is not None
        server.launcher.kill()
        server.launcher.wait(5)
        server.assert_nothing_left(within_s=12)
    finally:
        server.destroy()


def test_a_start_can_be_given_up() -> None:
    server = standin({"demo": {"load_s": 600}})
    try:
        server.start(wait=False)
        assert wait_until(lambda: bool(server.stubs()), 20)
        assert server.stop(timeout_s=4) <= 4
        server.assert_nothing_left(within_s=0.5)
    finally:
        server.destroy()


def test_an_idle_server_ends_soon_even_without_its_reaper() -> None:
    server = standin({"demo": {}}).start()
    try:
        reapers = [pid for pid, words in server.processes().items() if "reaper.py" in " ".join(words)]
        os.kill(reapers[0], signal.SIGKILL)
        assert server.stop() <= 6
        server.assert_nothing_left(within_s=0.5)
    finally:
        server.destroy()
