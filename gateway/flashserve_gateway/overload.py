"""Where requests wait when the engines' queues are full: for a while, and each key for its share.

An engine's own queue serves first who came first, so that a key which fills it would shut all others out. Whoever is
refused there waits here, and goes in as others end, one at a time, in the order of a fair queue. Without a refusal
nobody waits, and a request costs nothing but a look whether somebody does.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from types import TracebackType

from flashserve_client import Unavailable

from .fair_queue import Entry, FairQueue, Share

_LOOK_AGAIN_S = (0.05, 1.0)
"""Others than our own requests take and leave places too, so one of those that wait tries now and then."""
_SMOOTHING = 0.2
_TRIED_S = 1.0


class Line:
    """Of one model: who waits."""

    def __init__(self, most: int) -> None:
        """``most``: how many may wait."""
        self._most = most
        self._queue: FairQueue[asyncio.Future[None]] = FairQueue()
        self._timer: asyncio.TimerHandle | None = None
        self._retry_s = _TRIED_S
        self._pace_s = 0.0
        self._last_end = -math.inf

    def __len__(self) -> int:
        return len(self._queue)

    async def wait(self, place: Entry[asyncio.Future[None]], until: float, had_turn: bool) -> None:
        """Returns when it is the request's turn to ask an engine.

        Args:
            until: by the loop's clock.
            had_turn: it asked before, in vain.

        Raises Unavailable when that does not come in time, or the line is full.
        """
        if not self._queue:
            self._last_end = -math.inf  # the time since the last line was no pace
        if had_turn:
            self._queue.push_back(place)
        else:
            self._make_room(place)
            self._queue.push(place)
        self._look_again_later()
        try:
            await asyncio.wait([place.item], timeout=max(0.0, until - asyncio.get_running_loop().time()))
            if not place.item.done():
                raise self.refusal()
            place.item.result()
        except BaseException:
            if place.item.done():
                if place.item.exception() is None:  # its turn came while it left
                    self.let_in()
            else:
                self._queue.remove(place)
            raise

    def refused(self, error: Unavailable) -> None:
        """An engine is full; it says when it is worth asking again."""
        self._retry_s = (error.retry_after_ms or 1000 * _TRIED_S) / 1000

    def ended(self) -> None:
        """A request that an engine had is over, so there is a place."""
        now = asyncio.get_running_loop().time()
        if self._queue:
            took_s = now - self._last_end
            if math.isfinite(took_s):
                self._pace_s += _SMOOTHING * (took_s - self._pace_s) if self._pace_s else took_s
            self._last_end = now
            self.let_in()

    def let_in(self) -> None:
        """The next one's turn, if anybody waits."""
        if self._queue:
            self._queue.pop().item.set_result(None)

    def refusal(self) -> Unavailable:
        """What those are told who cannot wait longer: when all who wait now will have had their turn."""
        wait_s = max(self._retry_s, (len(self._queue) + 1) * self._pace_s)
        return Unavailable(
            f"the queue is full, and {len(self._queue)} requests wait for it", retry_after_ms=math.ceil(wait_s * 1000)
        )

    def _make_room(self, newcomer: Entry[asyncio.Future[None]]) -> None:
        """A line that is full sends away the last of the key that has the most in it."""
        if len(self._queue) < self._most:
            return
        last = self._queue.last_of_greediest()
        if self._queue.count(last.share.name) <= self._queue.count(newcomer.share.name) + 1:
            raise self.refusal()
        self._queue.remove(last)
        last.item.set_exception(self.refusal())

    def _look_again_later(self) -> None:
        if self._timer is None:
            shortest, longest = _LOOK_AGAIN_S
            wait_s = min(max(self._retry_s, shortest), longest)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.let_in()
        if self._queue:
            self._look_again_later()


class Lines:
    """Of all models."""

    def __init__(self, wait_s: float, most: int) -> None:
        """
        Args:
            wait_s: how long a request may wait; 0: not at all.
            most: how many may wait for one model.
        """
        self._wait_s = wait_s
        self._most = most
        self._lines: dict[str, Line] = {}

    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._lines.values()))

    def turn(self, model: str, share: Share, cost: Callable[[], int], priority: int | None) -> Turn:
        """For one request: `async with` it while an engine is asked. ``cost`` is asked only if it has to wait."""
        return Turn(self, model, share, cost, priority or 0)

    def of(self, model: str) -> Line | None:
        """Its line, if anybody ever waited."""
        return self._lines.get(model)

    def made_for(self, model: str) -> Line:
        """Its line. As many are kept as there are models."""
        return self._lines.setdefault(model, Line(self._most))

    @property
    def wait_s(self) -> float:
        """How long a request may wait."""
        return self._wait_s


class Turn:
    """A request that is about to ask an engine. Entering waits if others do; leaving makes room for the next."""

    def __init__(self, lines: Lines, model: str, share: Share, cost: Callable[[], int], priority: int) -> None:
        self._lines = lines
        self._model = model
        self._share = share
        self._cost = cost
        self._priority = priority
        self._until: float | None = None
        self._has_place = False

    async def __aenter__(self) -> Turn:
        line = self._lines.of(self._model)
        if line is not None and len(line):
            await self._wait(line)
        self._has_place = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        line = self._lines.of(self._model)
        if self._has_place and line is not None:
            line.ended()

    async def again(self, error: Unavailable) -> None:
        """After an engine's refusal: returns when the next try is due. Raises what the client is to be told."""
        if not error.is_full or not self._lines.wait_s:
            raise error
        self._has_place = False
        line = self._lines.made_for(self._model)
        line.refused(error)
        await self._wait(line)
        self._has_place = True

    async def _wait(self, line: Line) -> None:
        loop = asyncio.get_running_loop()
        had_turn = self._until is not None
        if self._until is None:
            self._until = loop.time() + self._lines.wait_s
        place = Entry(loop.create_future(), self._share, self._cost(), self._priority)
        await line.wait(place, self._until, had_turn)
