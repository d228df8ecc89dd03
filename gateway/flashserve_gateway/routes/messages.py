"""/v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from ..chat import ChatRequest
from ..errors import ANTHROPIC_PATH, anthropic_error
from ..gateway import Call, Gateway
from ..incoming import unless_gone
from ..messages import (
    complete_messages,
    count_tokens,
    event,
    read_count_request,
    read_messages,
    stream_messages,
)
from ..sse import EventStream
from . import documents

_MESSAGES = {"model": {"type": "string"}, "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}}}
_EXAMPLE = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32}
_BODY = documents.body(
    {**_MESSAGES, "max_tokens": {"type": "integer", "minimum": 1}},
    {"stream": {"type": "boolean"}, "system": {"type": "string"}},
    _EXAMPLE,
)
_COUNT_BODY = documents.body(_MESSAGES, {"system": {"type": "string"}}, _EXAMPLE)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["Anthropic"])

    @router.post(ANTHROPIC_PATH, openapi_extra=_BODY, responses=documents.responses())
    async def create_message(request: Request) -> Response:
        call = await gateway.begin(request)
        chat = read_messages(call)
        if chat.ask.stream:
            return EventStream(
                stream_messages(call, chat),
                call.explain,
                settings=gateway.settings,
                headers=call.headers,
                error_body=anthropic_error,
                error_event=lambda body: b"event: error\ndata: " + body + b"\n\n",
                keep_alive=event("ping"),
            )
        answer = await unless_gone(request, complete_messages(call, chat))
        return Response(orjson.dumps(answer), headers=call.headers, media_type="application/json")

    @router.post(f"{ANTHROPIC_PATH}/count_tokens", openapi_extra=_COUNT_BODY, responses=documents.responses())
    async def count(request: Request) -> dict[str, Any]:
        call = await gateway.begin(request)
        return {"input_tokens": await unless_gone(request, _count(call, read_count_request(call)))}

    return router


async def _count(call: Call, chat: ChatRequest) -> int:
    async with call.admitted(chat.ask.model):
        return await count_tokens(call, chat)
