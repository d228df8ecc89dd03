"""A Redis that may be away: nothing waits for it longer than half a second, and only once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from .interface import StoreAway

log = logging.getLogger("flashserve_gateway")

T = TypeVar("T")

ANSWER_S = 0.5
"""All that one question may take, from connecting to the answer."""
_LOOK_S = 1.0
_AT_ONCE = 32
"""Questions; others wait for their turn, which is no fault of Redis. Each has a connection."""
_PROBE_LIFETIME_S = 10
PREFIX = "flashserve:"
"""Of all keys. Deployments that must not share use different databases (redis://HOST/1)."""


class RedisConnection:
    """Asks while Redis answers. Whoever finds that it does not says so to all others, who then do not ask; a look once
    a second finds out when it is back. The log has a line for each of both, and none for a request."""

    def __init__(self, url: str) -> None:
        """Raises ValueError for a bad URL. Nothing is asked yet."""
        # redis-py's own tries take three seconds of each question to a Redis that is away.
        options: dict[str, Any] = {
            **parse_url(url), "max_connections": _AT_ONCE + 1, "timeout": ANSWER_S, "socket_timeout": ANSWER_S,
            "socket_connect_timeout": ANSWER_S, "retry": Retry(NoBackoff(), 0),
        }  # fmt: skip
        self._pool = BlockingConnectionPool(**options)  # the plain one raises when all are in use
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self.redis: Redis = Redis(connection_pool=self._pool)
        self._is_away = True
        self._reason: str | None = None
        self._probe_key = f"{PREFIX}probe:{secrets.token_hex(8)}"
        self._looking: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether it did not answer when it was last asked."""
        return self._is_away

    async def start(self) -> None:
        """Looks for it once, and from then on every second."""
        await self._look()
        self._looking = asyncio.create_task(self._keep_looking())

    async def aclose(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(self._pool.disconnect(), ANSWER_S)

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """What Redis answers. Raises StoreAway, at once while it is known to be away."""
        async with self._turns:
            if self._is_away:  # by now
                raise StoreAway
            try:
                return await asyncio.wait_for(_as_coroutine(question), ANSWER_S)
            except (RedisError, OSError, asyncio.TimeoutError) as error:
                self._lost(error)
                raise StoreAway from error

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._look()

    async def _look(self) -> None:
        try:
            # Not a PING: a replica, or a Redis whose memory is full, answers that and keeps nothing.
            writing = self.redis.set(self._probe_key, b"", ex=_PROBE_LIFETIME_S)
            await asyncio.wait_for(writing, ANSWER_S)
        except (RedisError, OSError, asyncio.TimeoutError) as error:
            self._lost(error)
        else:
            if self._is_away:
                self._is_away, self._reason = False, None
                log.info("Redis answers: responses, quotas and kept answers are shared")

    def _lost(self, error: Exception) -> None:
        if self._is_away and self._reason is not None:
            return
        self._is_away = True
        self._reason = str(error) or type(error).__name__  # names the host, and never the URL with its password
        log.warning(
            "Redis is away (%s): quotas are this gateway's own, no answer is kept or found, and requests that go on "
            "from a response get 503, until it is back", self._reason,
        )  # fmt: skip


async def _as_coroutine(question: Callable[[], Awaitable[T]]) -> T:
    return await question()
