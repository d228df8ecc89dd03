"""What a process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the background of a script."""

from __future__ import annotations

import signal
import time

import pytest
from test_launcher import ask, standin


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_an_ignored_signal_does_not_end_the_server(number: signal.Signals) -> None:
    server = standin({"demo": {}})
    before = signal.signal(number, signal.SIG_IGN)  # a child inherits that, and no handler
    try:
        server.start(wait=False)
    finally:
        signal.signal(number, before)
    with_server = server.launcher
    assert with_server is not None
    try:
        server.wait_ready()
        with_server.send_signal(number)
        time.sleep(1.0)
        assert with_server.poll() is None
        assert ask(server) == ["one", "two", "three"]
        server.stop()
        server.assert_nothing_left()
    finally:
        server.destroy()
