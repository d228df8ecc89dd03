"""A time limit on whatever a stream waits for, at one timer per stream."""

from __future__ import annotations

import asyncio
from types import TracebackType

from .errors import Timeout


class Deadline:
    """Bounds every `with deadline:` block by one common point in time; a block that is late raises Timeout.

    A timer per wait (asyncio.wait_for) would cost 20-30 µs per token; this costs one per stream. Blocks may be in
    different tasks, one at a time.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._task: asyncio.Task[object] | None = None
        self._expired = False
        loop = asyncio.get_running_loop()
        self._ends = loop.time() + seconds
        self._handle = loop.call_later(seconds, self._expire)

    def remaining(self) -> float:
        """Seconds left; negative when it has passed."""
        return self._ends - asyncio.get_running_loop().time()

    def cancel(self) -> None:
        """Stops the timer."""
        self._handle.cancel()

    def __enter__(self) -> None:
        if self._expired:
            raise self._error()
        self._task = asyncio.current_task()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._expired and kind is asyncio.CancelledError:
            # Python 3.11 counts cancellations; if somebody else cancelled too, theirs must win.
            if task is not None and hasattr(task, "uncancel") and task.uncancel() > 0:
                return
            raise self._error() from None

    def _expire(self) -> None:
        self._expired = True
        if self._task is not None:
            self._task.cancel()

    def _error(self) -> Timeout:
        return Timeout(f"the answer was not complete after {self._seconds:.1f} s, and the server did not say why")
