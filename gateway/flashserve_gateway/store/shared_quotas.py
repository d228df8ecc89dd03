"""Quotas of keys over all gateways of a Redis.

Each key with limits has a sorted set of the places that its requests take, scored by when each place ends unless its
gateway says again that it is needed: what a killed gateway held is free again after `LEASE_S`. Its tokens are a bucket
in a hash. Both are read and changed by scripts, each of which Redis runs as a whole and by its own clock.

What this gateway lets in is counted here too. While Redis is away that alone decides, so that a key has its limits at
each gateway; what ran meanwhile is told to Redis when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ..keys import Admission, Caller
from .connection import PREFIX, RedisConnection
from .interface import Asked, StoreAway

_Args = list[str | int]
LEASE_S = 15.0
"""A gateway renews its places three times in that time."""

# Time in milliseconds. Numbers become integers on the way out of a script, so that fractions leave it as strings.
_BUCKET = """
local clock = redis.call('TIME')
local now = clock[1] * 1000 + clock[2] / 1000
local function fill(bucket, per_minute)
  local held = redis.call('HMGET', bucket, 'tokens', 'at')
  local tokens, at = tonumber(held[1]) or per_minute, tonumber(held[2]) or now
  return math.min(per_minute, tokens + math.max(0, now - at) * per_minute / 60000)
end
local function save(bucket, per_minute, tokens)
  tokens = math.min(per_minute, tokens)
  redis.call('HSET', bucket, 'tokens', tostring(tokens), 'at', tostring(now))
  redis.call('PEXPIRE', bucket, math.ceil((per_minute - tokens) * 60000 / per_minute) + 1000)
end
local function hold(places, lease, first)
  for index = first, #ARGV do redis.call('ZADD', places, now + lease, ARGV[index]) end
  if #ARGV >= first then redis.call('PEXPIRE', places, lease) end
end
"""
_CLAIM = (
    _BUCKET
    + """
local limit, per_minute, tokens, left = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
if #ARGV > 5 then
  redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
  if redis.call('ZCARD', KEYS[1]) + #ARGV - 5 > limit then return {'places', ''} end
end
if per_minute > 0 then
  local there = fill(KEYS[2], per_minute)
  if there < left + 1 then return {'tokens', tostring((left + 1 - there) * 60 / per_minute)} end
  save(KEYS[2], per_minute, there - tokens)
end
hold(KEYS[1], tonumber(ARGV[5]), 6)
return {'in', ''}
"""
)
_RENEW = (
    _BUCKET
    + """
if tonumber(ARGV[2]) ~= 0 then
  save(KEYS[2], tonumber(ARGV[1]), fill(KEYS[2], tonumber(ARGV[1])) + tonumber(ARGV[2]))
end
hold(KEYS[1], tonumber(ARGV[3]), 4)
"""
)
_LEAVE = (
    _BUCKET
    + """
if tonumber(ARGV[2]) ~= 0 then
  save(KEYS[2], tonumber(ARGV[1]), fill(KEYS[2], tonumber(ARGV[1])) + tonumber(ARGV[2]))
end
for index = 3, #ARGV do redis.call('ZREM', KEYS[1], ARGV[index]) end
"""
)


@dataclass
class _Claim:
    """What one request has of its key."""

    caller: Caller
    asked: Asked
    charged: int = 0
    """Tokens that Redis took for it."""
    admission: Admission | None = None
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Renewed after it left, it would keep its places."""

    @property
    def keys(self) -> list[str]:
        name = quote(self.caller.key.name, safe="")
        return [f"{PREFIX}places:{name}", f"{PREFIX}tokens:{name}"]

    @property
    def members(self) -> list[str]:
        """The places that it takes; none of a key without such a limit."""
        is_counted = self.caller.key.requests_in_flight is not None
        return [f"{self.asked.request_id}:{index}" for index in range(self.asked.places)] if is_counted else []

    @property
    def per_minute(self) -> int:
        return self.caller.key.tokens_per_minute or 0

    @property
    def used(self) -> int:
        return self.admission.used if self.admission is not None and self.per_minute else 0


class SharedQuotas:
    """Admits by what all gateways let in."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._claim_script, self._renew_script, self._leave_script = map(
            connection.redis.register_script, (_CLAIM, _RENEW, _LEAVE)
        )
        self._claims: dict[str, _Claim] = {}
        self._renewing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self) -> None:
        self._renewing = asyncio.create_task(self._keep_renewing())

    async def aclose(self) -> None:
        """When what was let in has ended."""
        if self._renewing is not None:
            self._renewing.cancel()
        await asyncio.gather(*self._tasks, *filter(None, [self._renewing]), return_exceptions=True)

    @contextlib.asynccontextmanager
    async def admit(self, caller: Caller, asked: Asked) -> AsyncIterator[Admission]:
        caller.check(asked.model, asked.places)
        claim = _Claim(caller, asked)
        if not claim.members and not claim.per_minute:
            with caller.hold(asked.places, asked.tokens) as admission:
                yield admission
            return
        if not await self._claimed(claim):
            caller.check_room(asked.places, asked.in_background)
        with caller.hold(asked.places, asked.tokens) as claim.admission:
            self._claims[asked.request_id] = claim
            try:
                yield claim.admission
            finally:
                del self._claims[asked.request_id]
                # Who left may have been cancelled, and his places must be free all the same. Who was not hears the end
                # of his answer when they are, so that he can ask again.
                await asyncio.shield(self._spawn(self._leave(claim)))

    async def _claimed(self, claim: _Claim) -> bool:
        """False: Redis is away. Raises ApiError for what is refused."""
        claiming = self._spawn(self._claim(claim))
        try:
            answer, wait_s = await asyncio.shield(claiming)
        except StoreAway:
            return False
        except asyncio.CancelledError:
            self._spawn(self._undo(claiming, claim))
            raise
        if answer == b"places":
            raise claim.caller.too_many_in_flight()
        if answer == b"tokens":
            raise claim.caller.too_many_tokens(float(wait_s))
        return True

    async def _claim(self, claim: _Claim) -> tuple[bytes, bytes]:
        per_minute, asked = claim.per_minute, claim.asked
        tokens = min(asked.tokens, per_minute)
        left = per_minute // 2 if asked.in_background else 0
        limit = claim.caller.key.requests_in_flight or 0
        args: _Args = [limit, per_minute, tokens, left, _lease_ms(), *claim.members]
        answer, wait_s = await self._connection.ask(lambda: self._claim_script(keys=claim.keys, args=args))
        if answer == b"in":
            claim.charged = tokens
        return answer, wait_s

    async def _undo(self, claiming: asyncio.Task[tuple[bytes, bytes]], claim: _Claim) -> None:
        """Of a client that went away before it knew whether it was let in."""
        with contextlib.suppress(StoreAway):
            if (await claiming)[0] == b"in":
                await self._leave(claim)

    async def _leave(self, claim: _Claim) -> None:
        async with claim.asking:
            args: _Args = [claim.per_minute, claim.charged - claim.used, *claim.members]
            with contextlib.suppress(StoreAway):
                await self._connection.ask(lambda: self._leave_script(keys=claim.keys, args=args))

    async def _keep_renewing(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            with contextlib.suppress(StoreAway):
                for claim in list(self._claims.values()):
                    await self._renew(claim)

    async def _renew(self, claim: _Claim) -> None:
        """Also charges what it used beyond what it reserved: an answer may take many minutes. Raises StoreAway."""
        async with claim.asking:
            if claim.asked.request_id in self._claims:
                more = max(0, claim.used - claim.charged)
                args: _Args = [claim.per_minute, -more, _lease_ms(), *claim.members]
                await self._connection.ask(lambda: self._renew_script(keys=claim.keys, args=args))
                claim.charged += more

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _lease_ms() -> int:
    return round(LEASE_S * 1000)
