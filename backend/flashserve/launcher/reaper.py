"""Ends a run: its processes, shared memory and temporary folder. Also the program that does so when the
launcher cannot.

The launcher starts this file as a small process in a session of its own and keeps a pipe to it. When the
launcher is gone, however it died, the pipe closes, and the reaper does what the launcher would have done.
Standard library only and no import of flashserve: it runs as ``python -I -S reaper.py`` and is up in 20 ms.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

# The environment variable that marks every process of a run. It finds those that left the process group.
RUN_VARIABLE = "FLASHSERVE_RUN"
# Triton waits for requests in flight without a bound of its own (19.5 s were seen); so this is the bound.
GRACE_S = 9.0
# Without tritonserver there is nobody whom a stub could still answer; but calls on their way to it may lock a stub up.
ORPHAN_GRACE_S = 2.0
POLL_S = 0.1
SHARED_MEMORY = "/dev/shm"


@dataclass
class Run:
    """What a launcher has started, and how it is recognised."""

    run_id: str
    """Value of FLASHSERVE_RUN in its processes, and the start of its shared memory names."""
    folder: str
    """Its temporary folder."""
    leader: int | None = None
    """Process id of tritonserver, which leads its own process group."""


def run_processes(run: Run) -> list[int]:
    """Ids of the living processes of a run. A zombie has no environment, so it does not count."""
    marker = f"{RUN_VARIABLE}={run.run_id}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                with open(f"/proc/{entry}/environ", "rb") as environ:
                    if marker in environ.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:  # gone in the meantime, or another user's
                continue
    return found


def end_run(run: Run, grace_s: float = GRACE_S, hurry: Callable[[], bool] = lambda: False) -> bool:
    """Ask tritonserver to end, wait, then kill what is left; remove shared memory and files.

    ``hurry`` is asked while waiting; True ends the grace. Returns True if everything ended by itself.
    """
    deadline = time.monotonic() + grace_s
    if run.leader is not None:
        _signal(run.leader, signal.SIGTERM)
    peaceful = True
    while processes := run_processes(run):
        now = time.monotonic()
        if run.leader not in processes:
            deadline = min(deadline, now + ORPHAN_GRACE_S)
        if run.leader is None or now >= deadline or hurry():
            peaceful = False
            _kill_all(run)
            break
        time.sleep(POLL_S)
    _remove_files(run)
    return peaceful


def _kill_all(run: Run) -> None:
    # Until none is left: a process may fork between the listing and the signal.
    for _ in range(100):
        processes = run_processes(run)
        if not processes:
            return
        for process in processes:
            _signal(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _remove_files(run: Run) -> None:
    try:
        names = os.listdir(SHARED_MEMORY)
    except OSError:
        names = []
    for name in names:
        if name.startswith(run.run_id):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(SHARED_MEMORY, name))
    shutil.rmtree(run.folder, ignore_errors=True)


def main(arguments: list[str]) -> None:
    """``reaper.py RUN_ID FOLDER``; lines on stdin: ``leader PID``, and ``ended`` when there is nothing to do."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run = Run(run_id=arguments[0], folder=arguments[1])
    for line in sys.stdin:
        words = line.split()
        if words[0] == "leader":
            run.leader = int(words[1])
        elif words[0] == "ended":
            return
    end_run(run)


if __name__ == "__main__":
    main(sys.argv[1:])
