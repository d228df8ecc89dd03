"""Ends this process when tritonserver is gone, or when no Python code can run in it any more.

Triton 2.51 checks for the first itself, but that check locks up if a call into tritonserver was on its way. And as
its metric calls hold the interpreter's lock until they are answered, every other thread locks up as well.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time

log = logging.getLogger(__name__)

CHECK_S = 0.1
REARM_S = 1.0
FROZEN_S = 30.0  # without an interpreter's lock to be had: the process ends with a traceback of all threads
STOP_TIMEOUT_S = 2.0


class ServerWatch:
    """Owns one thread. To be made in the process that tritonserver has started."""

    def __init__(self) -> None:
        self._server = os.getppid()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="server-watch", daemon=True)

    @property
    def server_lives(self) -> bool:
        return os.getppid() == self._server

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        armed = 0.0
        while not self._stopping.wait(CHECK_S):
            if not self.server_lives:
                log.critical("tritonserver is gone: ending")
                os._exit(1)
            if time.monotonic() - armed > REARM_S:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(FROZEN_S, exit=True)
