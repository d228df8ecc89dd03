"""What a process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in the background of a script."""

from __future__ import annotations

import signal
import time

from test_launcher import ask, standin


def test_an_ignored_signal_does_not_end_the_server() -> None:
    server = standin({"demo": {}})
    numbers = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]  # a child inherits that, and no handler
    try:
        server.start(wait=False)
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    launcher = server.launcher
    assert launcher is not None
    try:
        server.wait_ready()
        for number in numbers:
            launcher.send_signal(number)
        time.sleep(1.0)
        assert launcher.poll() is None
        assert ask(server) == ["one", "two", "three"]
        server.stop()
        server.assert_nothing_left()
    finally:
        server.destroy()
