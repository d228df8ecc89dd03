"""The store that several gateways share: a Redis or a Valkey, of one node."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

from .connection import PREFIX, RedisConnection
from .interface import Quotas, Shelf
from .shared_quotas import SharedQuotas

_MOST_VALUE_BYTES = 8 << 20
"""Twice the largest body. What all values take together is for Redis' own `maxmemory`: each of them ends by itself."""


class RedisShelf:
    """A Redis key for each value."""

    def __init__(self, connection: RedisConnection, kind: str, lifetime_s: float) -> None:
        self._connection = connection
        self._kind = kind
        self._lifetime_ms = max(1, round(lifetime_s * 1000))

    async def get(self, owner: str, names: Sequence[str]) -> list[bytes | None]:
        keys = [self._key(owner, name) for name in names]
        found = await self._connection.ask(lambda: self._connection.redis.mget(keys))
        return [value if isinstance(value, bytes) else None for value in found]

    async def put(self, owner: str, name: str, value: bytes) -> bool:
        if len(value) > _MOST_VALUE_BYTES:
            return False
        key = self._key(owner, name)
        await self._connection.ask(lambda: self._connection.redis.set(key, value, px=self._lifetime_ms))
        return True

    async def remove(self, owner: str, name: str) -> None:
        await self._connection.ask(lambda: self._connection.redis.delete(self._key(owner, name)))

    def _key(self, owner: str, name: str) -> str:
        """Quoted, or the name `b:c` of `a` would be the name `c` of `a:b`."""
        return f"{PREFIX}{self._kind}:{quote(owner, safe='')}:{quote(name, safe='')}"


class RedisStore:
    """Of all gateways with the same URL."""

    def __init__(self, url: str, responses_s: float, answers_s: float) -> None:
        """
        Args:
            responses_s, answers_s: lifetimes, in seconds.

        Raises ValueError for a bad URL.
        """
        self._connection = RedisConnection(url)
        self._shared = SharedQuotas(self._connection)
        self.responses: Shelf = RedisShelf(self._connection, "response", responses_s)
        self.answers: Shelf = RedisShelf(self._connection, "answer", answers_s)
        self.quotas: Quotas = self._shared

    @property
    def state(self) -> str:
        return "away" if self._connection.is_away else "connected"

    async def start(self) -> None:
        await self._connection.start()
        self._shared.start()

    async def aclose(self) -> None:
        await self._shared.aclose()
        await self._connection.aclose()
