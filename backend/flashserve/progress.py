"""Whether a process does anything, of one that cannot be asked: whether it has run at all.

A stopped, frozen or swapped-out process exists, keeps its sockets open and answers nothing. Whoever waits for it can
tell it from one that takes long, as ours look around ten times a second while they wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

# Of the time between two looks: what the one who looks was stopped himself, as in a paused container, says nothing.
MAX_STEP_S = 2.0


class Progress:
    """Of one process."""

    def __init__(self, pid: int, clock: Callable[[], float] = time.monotonic, *, with_children: bool = False) -> None:
        """``with_children``: it may wait in the system for those that it has started, such as a compiler."""
        self._pid = pid
        self._with_children = with_children
        self._clock = clock
        self._ran: list[str] = []
        self._looked = clock()
        self._idle_s = 0.0

    def idle_s(self) -> float:
        """For how long it has not run. To be asked about once a second; 0 where the system does not tell."""
        now, ran = self._clock(), _ran(self._pid, self._with_children)
        self._idle_s = self._idle_s + min(now - self._looked, MAX_STEP_S) if ran and ran == self._ran else 0.0
        self._looked, self._ran = now, ran
        return self._idle_s


def _ran(pid: int, with_children: bool) -> list[str]:
    """How long each thread has run, of the process or of all its descendants as well."""
    found: list[str] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found.append((thread / "schedstat").read_text(encoding="ascii").split()[0])
            if with_children:
                for child in (thread / "children").read_text(encoding="ascii").split():
                    found += _ran(int(child), with_children)
    except OSError:  # ended in the meantime, or a system that does not tell
        pass
    return found
