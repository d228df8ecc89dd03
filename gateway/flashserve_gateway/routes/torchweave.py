"""TorchWeave's endpoints with its parameter names: /v1/generate, /v1/generate_nobatch, /model.

The first streams (event `ttft` with seconds, pieces of text, event `done`); the second answers one request at a time,
the baseline that shows what batching gives.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from flashserve_client import GenerateResult

from .. import parameters
from ..abilities import refuse_missing
from ..errors import ApiError, invalid
from ..gateway import Call, Gateway
from ..incoming import unless_gone
from ..pool import Answer, Ask
from ..sse import EventStream
from . import documents

_FIELDS = frozenset({"model_id", "prompt", "max_new_tokens"})
_DEFAULT_MAX_NEW_TOKENS = 128
_BODY = documents.body(
    {"prompt": {"type": "string"}},
    {"model_id": {"type": "string"}, "max_new_tokens": {"type": "integer"}, "temperature": {"type": "number"}},
    {"prompt": "def fibonacci(n):", "max_new_tokens": 32},
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["TorchWeave"])
    alone = asyncio.Lock()

    @router.post("/v1/generate", openapi_extra=_BODY, responses=documents.responses())
    async def generate(request: Request) -> Response:
        call = await gateway.begin(request)
        events = _events(call, _read(call, stream=True))
        return EventStream(
            events, call.explain, settings=gateway.settings, headers=call.headers, error_event=_error_event
        )

    @router.post("/v1/generate_nobatch", openapi_extra=_BODY, responses=documents.responses())
    async def generate_nobatch(request: Request) -> Response:
        call = await gateway.begin(request)
        ask = _read(call, stream=False)

        async def one() -> GenerateResult:
            async with call.admitted(ask.model, [ask]), alone:
                return await call.whole(ask)

        result = await unless_gone(request, one())
        answer = {"text": result.text, "tokens": result.completion_tokens, "total_time": result.latency_s}
        return Response(orjson.dumps(answer), headers=call.headers, media_type="application/json")

    @router.get("/model", responses=documents.responses(401, 503))
    async def model(request: Request) -> dict[str, Any]:
        """The model that is meant where a request names none."""
        caller = gateway.caller(request)
        names = [name for name in gateway.pool.models if caller.may_see(name)]
        if not names:
            raise ApiError(503, "no model is ready", retry_after_s=1.0)
        return {"model_id": names[0], "loaded_models": names}

    return router


def _read(call: Call, stream: bool) -> Ask:
    """Checks a body. Raises ApiError."""
    body = call.body
    parameters.check_names(body, _FIELDS)
    refuse_missing(body)
    prompt = parameters.read(body, "prompt", str, "")
    if not prompt:
        raise invalid("prompt", "prompt must be a non-empty string")
    named = parameters.read(body, "model_id", str, "")
    visible = [name for name in call.gateway.pool.models if call.caller.may_see(name)]
    if not named and not visible:
        raise ApiError(503, "no model is ready", retry_after_s=1.0)
    params = parameters.engine_params(body)
    params["max_tokens"] = parameters.read_count(body, "max_new_tokens") or _DEFAULT_MAX_NEW_TOKENS
    return Ask(named or visible[0], prompt, params, call.request_id, call.caller.priority(None), stream)


async def _events(call: Call, ask: Ask) -> AsyncGenerator[bytes, None]:
    answer, has_begun = Answer(), False
    async with call.admitted(ask.model, [ask]), contextlib.aclosing(call.pieces(ask, answer)) as pieces:
        async for delta in pieces:
            if not has_begun:
                has_begun = True
                yield b"event: ttft\ndata: %.6f\n\n" % (time.perf_counter() - call.started)
            if delta.text:
                yield _text_event(delta.text)
    tokens = answer.result.completion_tokens if answer.result is not None else 0
    yield b"event: done\ndata: " + orjson.dumps({"tokens": tokens}) + b"\n\n"


def _text_event(text: str) -> bytes:
    """Every line of a text is a line of the event."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "".join(f"data: {line}\n" for line in lines).encode() + b"\n"


def _error_event(body: bytes) -> bytes:
    return b"event: error\ndata: " + body + b"\n\n"
