"""Requests as they come in: a body within its limits, and whether the client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect

from .errors import ApiError, invalid
from .settings import Limits

T = TypeVar("T")


class ClientGone(Exception):
    """Nobody waits for the answer."""


async def read_object(request: Request, limits: Limits) -> dict[str, Any]:
    """The JSON object that is a request's body. Raises ApiError and ClientGone."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        # Also a guard: a page of another site may send text and forms to this machine, but JSON only if it may.
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json", close=True)
    try:
        body = await asyncio.wait_for(_read(request, limits), limits.body_timeout_s)
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
    if not isinstance(value, dict):
        raise invalid(None, "the body must be a JSON object")
    return value


async def _read(request: Request, limits: Limits) -> bytes:
    too_large = ApiError(413, f"the body has more than {limits.body_bytes} bytes", code="body_too_large", close=True)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.body_bytes:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limits.body_bytes:
            raise too_large
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
