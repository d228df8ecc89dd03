"""Ends a run: its processes, shared memory and temporary folder. Also the program that does so when the
launcher cannot.

The launcher starts this file as a small process in a session of its own and keeps a pipe to it. When the
launcher is gone, however it died, the pipe closes, and the reaper does what the launcher would have done.
Standard library only and no import of flashserve: it runs as ``python -I -S reaper.py`` and is up in 20 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

# The environment variable that marks every process of a run. It finds those that left the process group.
RUN_VARIABLE = "FLASHSERVE_RUN"
# Triton waits for requests in flight without a bound of its own (19.5 s were seen); so this is the bound.
GRACE_S = 8.5
# Without tritonserver there is nobody whom a stub could still answer; but calls on their way to it may lock a stub up.
ORPHAN_GRACE_S = 2.0
# Of that time: until then requests have their end, so that tritonserver can send what it was and unload the models,
# which took it 3.4 s on two cores with ten busy processes.
SHARE_OF_REQUESTS = 0.55
# Killed processes are gone in milliseconds; one with many gigabytes may take longer than anybody should wait.
KILL_S = 1.0
POLL_S = 0.1
# In the run's folder: when the stubs' requests must have ended, in seconds of time.monotonic(), which all processes
# share.
ENDING_FILE = "ending"
SHARED_MEMORY = "/dev/shm"
# In the run's folder: with what each model was loaded, as its stub has noted it (flashserve.load_notes).
NOTES_FOLDER = "loads"
# Triton's own folders, for files that clients gave and for models from a bucket: stub_processes' COPY, which this
# program does not import.
COPY = re.compile(r"/tmp/folder\w{6}")


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
    """End a run's processes; remove shared memory and files. Arguments and result are those of end_processes."""
    peaceful = end_processes(run, grace_s, hurry)
    clear(run)
    shutil.rmtree(run.folder, ignore_errors=True)
    return peaceful


def end_processes(run: Run, grace_s: float, hurry: Callable[[], bool] = lambda: False) -> bool:
    """Ask stubs and tritonserver to end, wait, then kill what is left.

    ``hurry`` is asked while waiting; True ends the grace. Returns True if everything ended by itself.
    """
    started = time.monotonic()
    deadline = started + grace_s
    _tell_stubs(run, started + grace_s * SHARE_OF_REQUESTS)
    if run.leader is not None:
        _signal(run.leader, signal.SIGTERM)
    while processes := run_processes(run):
        now = time.monotonic()
        if run.leader not in processes:
            deadline = min(deadline, now + ORPHAN_GRACE_S)
        if run.leader is None or now >= deadline or hurry():
            _kill_all(run)
            return False
        time.sleep(POLL_S)
    return True


def clear(run: Run) -> None:
    """Remove the shared memory of a run whose processes have ended, and what told them to."""
    try:
        names = os.listdir(SHARED_MEMORY)
    except OSError:
        names = []
    for name in names:
        if name.startswith(run.run_id):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(SHARED_MEMORY, name))
    with contextlib.suppress(OSError):
        os.unlink(os.path.join(run.folder, ENDING_FILE))
    _remove_copies(run)


def _remove_copies(run: Run) -> None:
    """Files that clients gave with a load: a tritonserver that was killed leaves its copies of them."""
    notes = os.path.join(run.folder, NOTES_FOLDER)
    with contextlib.suppress(OSError, ValueError, KeyError):
        for name in os.listdir(notes):
            model, suffix = os.path.splitext(name)
            if suffix == ".json":
                with open(os.path.join(notes, name), encoding="utf-8") as file:
                    folder = json.load(file)["folder"]
                if COPY.fullmatch(folder) and os.path.basename(folder) != model:
                    shutil.rmtree(folder, ignore_errors=True)


def _tell_stubs(run: Run, deadline: float) -> None:
    """Stubs look for this file ten times a second. From Triton alone they would learn of the end late, and never how
    much time there is: what had not finished was cut off without a word."""
    path = os.path.join(run.folder, ENDING_FILE)
    with contextlib.suppress(OSError):
        with open(path + ".new", "w", encoding="ascii") as file:
            file.write(repr(deadline))
        os.replace(path + ".new", path)


def _kill_all(run: Run) -> None:
    # Until none is left: a process may fork between the listing and the signal.
    deadline = time.monotonic() + KILL_S
    while (processes := run_processes(run)) and time.monotonic() < deadline:
        # Tritonserver first: its clients see a connection that breaks, and never a stream that its stub's death ended.
        for process in sorted(processes, key=lambda process: process != run.leader):
            _signal(process, signal.SIGKILL)
        time.sleep(POLL_S)


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def main(arguments: list[str]) -> None:
    """``reaper.py RUN_ID FOLDER``; lines on stdin: ``leader PID`` (0: none at present), ``ended``: nothing is left."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run = Run(run_id=arguments[0], folder=arguments[1])
    for line in sys.stdin:
        words = line.split()
        if words[0] == "leader":
            run.leader = int(words[1]) or None
        elif words[0] == "ended":
            return
    end_run(run)


if __name__ == "__main__":
    main(sys.argv[1:])
