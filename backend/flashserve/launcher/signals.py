"""Signals as something to wait for: handlers only note them, the main loop decides."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import time
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# One Ctrl-C may arrive twice, from the terminal and from `make` or `timeout` around us; that is no hurry.
SAME_S = 0.5


class Signals:
    """Notes SIGINT, SIGTERM and SIGHUP, and ends a wait when one arrives.

    A signal that this process was started to ignore stays ignored: SIGHUP under nohup, SIGINT in a script's background.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._hurry = False
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    @property
    def received(self) -> bool:
        """True once a signal asked for the end."""
        return self._first is not None

    @property
    def hurry(self) -> bool:
        """True once a second Ctrl-C asked for the end at once."""
        return self._hurry

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif number == signal.SIGINT and now - self._first > SAME_S:
            self._hurry = True
        # A byte instead of threading.Event, whose lock the interrupted thread may hold.
        with contextlib.suppress(OSError):
            self._send.send(b"!")

    def wait(self, timeout_s: float) -> bool:
        """Sleep; True if a signal has arrived so far."""
        if not self.received:
            select.select([self._receive], [], [], timeout_s)
        return self.received
