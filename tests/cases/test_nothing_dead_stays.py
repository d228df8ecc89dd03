"""What died is reaped: in a container the first process often waits for no child, and each death left a zombie."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import Server, wait_until
from null_models import null_model, write_null_model

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def first_process() -> Iterator[None]:
    """Whose parents died becomes a child of this process, as of a container's first."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    yield
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


def test_a_killed_stub_and_its_engine_leave_no_zombie(first_process: None, tmp_path: Path) -> None:
    with Server({"demo": null_model(write_null_model(tmp_path / "null"))}) as server:
        assert server.launcher is not None
        before = {child.pid for child in psutil.Process().children()}
        dead = [server.stubs("demo")[0].pid]
        dead += server.engines()
        assert len(dead) == 2
        os.kill(dead[0], signal.SIGKILL)
        server.wait_for_log("model demo: ready again", 60)
        assert wait_until(lambda: [state(pid) for pid in dead] == ["gone", "gone"], 20), [state(pid) for pid in dead]
        assert {child.pid for child in psutil.Process().children()} <= before
