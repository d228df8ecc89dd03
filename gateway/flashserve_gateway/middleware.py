"""What surrounds every request: its id, its count, and the last resort for exceptions.

Pure ASGI: under one of starlette's BaseHTTPMiddlewares an endpoint that waits does not learn that its client has gone.
"""

from __future__ import annotations

import logging
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashserve_client.request import new_request_id

from .errors import ApiError, body_for, internal_error
from .incoming import ClientGone
from .metrics import Metrics
from .settings import LOOPBACK

log = logging.getLogger("flashserve_gateway")

_CLIENT_GONE = 499
_OWN_NAMES = (*LOOPBACK, "[::1]")
_PORT = re.compile(r":\d+$")


class Surround:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, metrics: Metrics, is_private: bool) -> None:
        """``is_private``: only this machine is served, and asked for no key."""
        self._app = app
        self._metrics = metrics
        self._is_private = is_private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.perf_counter(), 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            refusal = _refuse_encoded(scope) or (_refuse_foreign(scope) if self._is_private else None)
            if refusal is None:
                await self._app(scope, receive, send_named)
            else:
                await _send_error(refusal, scope, send_named)
        except ClientGone:
            status = _CLIENT_GONE
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:
                await _send_error(internal_error(request_id), scope, send_named)
        finally:
            # The route's pattern, not the path: a label has as many values as there are endpoints.
            endpoint = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(endpoint, status or _CLIENT_GONE).inc()
            self._metrics.duration.labels(endpoint).observe(time.perf_counter() - started)


def _refuse_encoded(scope: Scope) -> ApiError | None:
    """A compressed body could unfold to any size."""
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.lower() != b"identity":
            return ApiError(415, "a body with a Content-Encoding is not taken", close=True)
    return None


def _refuse_foreign(scope: Scope) -> ApiError | None:
    """A page of another site can have its own name resolve to this machine, and is then of the same origin as we: only
    the name tells it from a page of ours."""
    for name, value in scope["headers"]:
        if name == b"host" and _PORT.sub("", value.decode("latin-1").lower()) not in _OWN_NAMES:
            words = "this gateway asks for no key and serves its own machine, as localhost; for others: --keys FILE"
            return ApiError(403, words, code="foreign_host", close=True)
    return None


async def _send_error(error: ApiError, scope: Scope, send: Send) -> None:
    """The answer that tells of an error."""
    body = body_for(scope["path"], error)
    headers = [(name.encode(), value.encode("latin-1")) for name, value in error.headers.items()]
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
