"""The store of a gateway that is alone: this process's memory."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Mapping, Sequence

from ..keys import Admission, Caller
from .interface import Asked, Quotas, Shelf

_NOTHING: Mapping[str, tuple[float, bytes]] = {}


class MemoryShelf:
    """Values, of all owners together at most ``most_bytes``: beyond that, the owner with the most loses its oldest."""

    def __init__(self, lifetime_s: float, most_bytes: int) -> None:
        self._lifetime_s = lifetime_s
        self._most_bytes = most_bytes
        self._kept: dict[str, OrderedDict[str, tuple[float, bytes]]] = {}  # by owner and name: until when, and what
        self._sizes: Counter[str] = Counter()

    async def get(self, owner: str, names: Sequence[str]) -> list[bytes | None]:
        now, kept = time.monotonic(), self._kept.get(owner, _NOTHING)
        return [kept[name][1] if name in kept and kept[name][0] >= now else None for name in names]

    async def put(self, owner: str, name: str, value: bytes) -> bool:
        now = time.monotonic()
        await self.remove(owner, name)  # so that the newest is the last
        self._kept.setdefault(owner, OrderedDict())[name] = (now + self._lifetime_s, value)
        self._sizes[owner] += len(value)
        for other in list(self._kept):
            while other in self._kept and next(iter(self._kept[other].values()))[0] < now:
                self._drop_oldest(other)
        while self._sizes.total() > self._most_bytes:
            self._drop_oldest(max(self._sizes, key=self._sizes.__getitem__))
        return name in self._kept.get(owner, _NOTHING)

    async def remove(self, owner: str, name: str) -> None:
        if name in self._kept.get(owner, {}):
            self._drop(owner, name)

    def _drop_oldest(self, owner: str) -> None:
        self._drop(owner, next(iter(self._kept[owner])))

    def _drop(self, owner: str, name: str) -> None:
        self._sizes[owner] -= len(self._kept[owner].pop(name)[1])
        if not self._kept[owner]:
            del self._kept[owner], self._sizes[owner]


class OwnQuotas:
    """By what this gateway let in itself."""

    @contextlib.asynccontextmanager
    async def admit(self, caller: Caller, asked: Asked) -> AsyncIterator[Admission]:
        with caller.admit(asked.model, asked.places, asked.tokens, asked.in_background) as admission:
            yield admission


class MemoryStore:
    """Is always there, and ends with the process."""

    state = ""

    def __init__(self, responses: MemoryShelf, answers: MemoryShelf) -> None:
        self.responses: Shelf = responses
        self.answers: Shelf = answers
        self.quotas: Quotas = OwnQuotas()

    async def start(self) -> None:
        pass

    async def aclose(self) -> None:
        pass
