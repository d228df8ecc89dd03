"""Signals as something to wait for: handlers only count, the main loop decides."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Counts SIGINT, SIGTERM and SIGHUP, and ends a wait when one arrives."""

    def __init__(self) -> None:
        self.count = 0
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        self._receive.setblocking(False)
        for number in STOPPING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        # A byte instead of threading.Event, whose lock the interrupted thread may hold.
        with contextlib.suppress(OSError):
            self._send.send(b"!")

    def wait(self, timeout_s: float) -> bool:
        """Sleep; True if a signal has arrived so far."""
        if self.count == 0 and select.select([self._receive], [], [], timeout_s)[0]:
            self._receive.recv(64)
        return self.count > 0
