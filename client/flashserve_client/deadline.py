"""Ends, from outside, whatever a stream waits for: because time is up or because it was closed."""

from __future__ import annotations

import asyncio
import sys
from types import TracebackType

from .errors import FlashserveError, Timeout


class Interruptible:
    """Its `with` blocks end with an error of choice as soon as `interrupt(error)` is called.

    The blocks may be in different tasks, but only one task may be in one at a time.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._error: FlashserveError | None = None
        self._cancelling = 0

    def interrupt(self, error: FlashserveError) -> None:
        """Raises `error` in the task that is in a block now, and in every later block. The first error stays."""
        if self._error is None:
            self._error = error
            if self._task is not None:
                self._task.cancel()

    def __enter__(self) -> None:
        if self._error is not None:
            raise self._error
        self._task = asyncio.current_task()
        if sys.version_info >= (3, 11):
            self._cancelling = self._task.cancelling() if self._task is not None else 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        if self._error is not None and kind is asyncio.CancelledError:
            # If somebody else cancelled too, theirs must win; only Python 3.11 and newer can tell.
            if sys.version_info >= (3, 11) and task is not None and task.uncancel() > self._cancelling:
                return
            raise self._error from None


class Deadline(Interruptible):
    """Interrupts with Timeout after `seconds` (None: never).

    A timer per wait (asyncio.wait_for) would cost 20-30 µs per token; this costs one timer per stream.
    """

    def __init__(self, seconds: float | None) -> None:
        super().__init__()
        self._seconds = seconds
        self._handle: asyncio.TimerHandle | None = None
        if seconds is not None:
            self._handle = asyncio.get_running_loop().call_later(seconds, self._expire)

    def remaining(self) -> float | None:
        """Seconds left; None if there is no limit."""
        return None if self._handle is None else self._handle.when() - asyncio.get_running_loop().time()

    def cancel(self) -> None:
        """Stops the timer."""
        if self._handle is not None:
            self._handle.cancel()

    def _expire(self) -> None:
        self.interrupt(
            Timeout(f"the answer was not complete after {self._seconds:.1f} s, and the server did not say why")
        )
