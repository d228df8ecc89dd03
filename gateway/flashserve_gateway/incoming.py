"""Requests as they come in: a body within its limits, and whether the client is still there."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect

from .errors import ApiError, invalid
from .settings import Limits

T = TypeVar("T")

_MOST_NESTING = 100


class ClientGone(Exception):
    """Nobody waits for the answer."""


class Bodies:
    """Bounds what the bodies of all requests take together while they are received. Their readers write to it."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes."""
        self._left = limit

    @contextlib.contextmanager
    def receiving(self) -> Iterator[Callable[[int], None]]:
        """A function that takes so many bytes more, until the block ends. It raises ApiError when none are left."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if size > self._left:
                raise ApiError(
                    503, "too many bodies are being received", code="overloaded", retry_after_s=1.0, close=True
                )
            taken += size
            self._left -= size

        try:
            yield take
        finally:
            self._left += taken


async def read_object(request: Request, limits: Limits, bodies: Bodies) -> dict[str, Any]:
    """The JSON object that is a request's body. Raises ApiError and ClientGone."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also a guard: a page of another site may send text and forms to this machine, but JSON only if it may.
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json", close=True)
    with bodies.receiving() as take:
        try:
            body = await asyncio.wait_for(_read(request, limits, take), limits.body_timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body was not complete within {limits.body_timeout_s:g} s", code="slow_body", close=True
            ) from None
        except ClientDisconnect:
            raise ClientGone from None
    try:
        # Not json: that takes a nesting of any depth, lone surrogates and NaN.
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid(None, f"the body is not valid JSON: {error}") from None
    if is_nested_deeply(value):
        raise invalid(None, f"the body is nested more than {_MOST_NESTING} levels deep")
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object")
    return value


def is_nested_deeply(value: Any) -> bool:
    """Whether JSON is nested further than anybody means it. orjson reads 1,024 levels and writes 254, json's own limit
    is the interpreter's stack: what passes here can be written again wherever it goes."""
    level = [value]
    for _ in range(_MOST_NESTING):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True


async def _read(request: Request, limits: Limits, take: Callable[[int], None]) -> bytes:
    too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large", close=True)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body_bytes:
            raise too_large
        take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled when the client goes away (ClientGone).

    The body must have been read: two readers of one connection would take each other's messages.
    """
    worker = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientGone
        return worker.result()
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
