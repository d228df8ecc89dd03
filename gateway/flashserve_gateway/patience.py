"""How long the gateway waits for an engine."""

from __future__ import annotations

import asyncio
import math
from types import TracebackType

from flashserve_client import Timeout
from flashserve_client.deadline import Interruptible


class Patience(Interruptible):
    """Each of its `with` blocks may take `limit_s` seconds, or ends with Timeout; what lies between them may take long.

    One timer that is seldom moved: asyncio.wait_for would cost 20-30 µs for each token.
    """

    def __init__(self, limit_s: float) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._until = math.inf
        self._begin(limit_s)

    def change(self, limit_s: float) -> None:
        """Of the blocks that follow."""
        self._timer.cancel()
        self._begin(limit_s)

    def __enter__(self) -> None:
        super().__enter__()
        self._until = self._loop.time() + self._limit_s

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._until = math.inf
        super().__exit__(kind, error, trace)

    def end(self) -> None:
        """Stops the timer."""
        self._timer.cancel()

    def _begin(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._timer = self._loop.call_later(limit_s, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if now >= self._until:
            self.interrupt(Timeout(f"nothing came within {self._limit_s:g} s"))
            return
        self._timer = self._loop.call_at(min(self._until, now + self._limit_s), self._look)
