"""The end of a run, by the launcher or, when that is killed, by its reaper."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time

from flashserve.launcher import reaper
from flashserve.launcher.console import Console
from flashserve.launcher.process import ServerProcess
from flashserve.launcher.signals import Signals

# While models load there is nothing to drain.
GRACE_BEFORE_READY_S = 1.0
REAP_WAIT_S = 0.5
DISMISS_WAIT_S = 2.0


class Guard:
    """The reaper process, which ends the run when this process dies first."""

    def __init__(self, run: reaper.Run) -> None:
        self._run = run
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(reaper.__file__), run.run_id, run.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def leader(self, pid: int | None) -> None:
        """Tell it which process leads the run; None: there is none at present."""
        self._run.leader = pid
        self._tell(f"leader {pid or 0}")

    def dismiss(self) -> None:
        """The run has ended; the reaper has nothing to do."""
        self._tell("ended")
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._popen.communicate(timeout=DISMISS_WAIT_S)

    def _tell(self, line: str) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):  # a reaper that was killed must not end the server
            self._popen.stdin.write(line + "\n")
            self._popen.stdin.flush()


def end(
    run: reaper.Run,
    guard: Guard,
    server: ServerProcess | None,
    signals: Signals,
    console: Console,
    was_ready: bool,
) -> None:
    """End whatever there is, within ten seconds, and say how."""
    started = time.monotonic()
    if server is not None and server.exit_code() is None:
        console.say("ending: running requests may finish (again Ctrl-C: at once)")
    grace_s = reaper.GRACE_S if was_ready else GRACE_BEFORE_READY_S
    peaceful = reaper.end_run(run, grace_s, hurry=lambda: signals.hurry)
    if server is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(REAP_WAIT_S)
        how = "" if peaceful else ", the rest was killed"
        console.say(f"ended after {time.monotonic() - started:.1f} s{how}")
    guard.dismiss()
