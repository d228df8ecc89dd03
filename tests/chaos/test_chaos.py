"""A short seed of the chaos that `make chaos` makes for longer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_half_a_minute_of_chaos_leaves_every_answer_right_and_nothing_behind() -> None:
    run("--minutes", "0.4", "--seed", "3", "--bound", "15")


def test_streams_end_with_their_server_and_it_comes_back_from_death() -> None:
    run("--ends", "1")


def run(*options: str) -> None:
    done = subprocess.run([sys.executable, str(RUN), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "nothing was wrong" in done.stdout
