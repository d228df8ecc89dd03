"""A line that repeats is held to one a second, however fast it comes: 65 MB in a minute were seen."""

from __future__ import annotations

import sys
import time

from flashserve.launcher.log_flood import FloodLimit
from flashserve.launcher.process import ServerProcess

ACCEPT = "[warn] Error from accept() call: Too many open files"


def test_a_warning_of_libevent_comes_once_a_second_with_a_count() -> None:
    now = [100.0]
    limit = FloodLimit(lambda: now[0])
    assert [limit.admit(ACCEPT) for _ in range(1000)] == [[ACCEPT], *[[]] * 999]
    assert limit.admit("another line") == ["another line"]
    now[0] += 1
    assert limit.admit(ACCEPT) == [f"{ACCEPT} [999 more of these within 1 s]", ACCEPT]
    assert limit.held() == []


def test_lines_that_differ_in_their_time_alone_are_one() -> None:
    limit = FloodLimit(lambda: 0.0)
    lines = [f"E1127 08:16:36.{number:06} 4255 http.cc:1] no" for number in range(100)]
    assert sum(len(limit.admit(line)) for line in lines) == 10
    assert limit.held() == ["http.cc:1] no [90 more of these within 1 s]"]


def test_lines_that_say_different_things_all_pass() -> None:
    limit = FloodLimit(lambda: 0.0)
    lines = [f"request id={number} tokens=16" for number in range(1000)]
    assert [line for one in lines for line in limit.admit(one)] == lines


def test_the_log_of_a_server_and_its_end_are_held_short() -> None:
    shown: list[str] = []
    program = f"print('the last words of another kind'); [print({ACCEPT!r}) for _ in range(200_000)]"
    server = ServerProcess([sys.executable, "-c", program], {}, shown.append, verbose=True)
    deadline = time.monotonic() + 60
    while server.exit_code() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    server.wait(10)
    assert 3 <= len(shown) < 1000
    assert server.last_lines(400) == shown[-400:]
    assert "the last words of another kind" in shown
