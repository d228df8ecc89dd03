"""Takes in processes whose parents died, and reaps them.

An engine whose stub was killed becomes a child of the first process, which in a container is often a program that never
waits for children: each death left a zombie there. So the launcher takes their place.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import time
from collections.abc import Collection

from flashserve.stub_processes import children

PR_SET_CHILD_SUBREAPER = 36
PERIOD_S = 1.0


class Orphans:
    """Children of this process that it has not started itself."""

    def __init__(self) -> None:
        self._looked = 0.0
        with contextlib.suppress(OSError, AttributeError):  # no such call: the first process gets them as before
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def reap(self, own: Collection[int], at_once: bool = False) -> None:
        """Collect those that have ended, about once a second; ``own`` are waited for elsewhere."""
        now = time.monotonic()
        if not at_once and now - self._looked < PERIOD_S:
            return
        self._looked = now
        for child in children(os.getpid()):
            if child not in own:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child, os.WNOHANG)
