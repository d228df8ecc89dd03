"""/v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..chat import complete_chat, read_chat, stream_chat
from ..gateway import Gateway
from ..incoming import unless_gone
from ..logprobs import MOST
from ..sse import EventStream
from . import documents

_BODY = documents.body(
    {"model": {"type": "string"}, "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}}},
    {
        **documents.SAMPLING,
        "tools": {"type": "array", "items": {"type": "object"}},
        "logprobs": {"type": "boolean"},
        "top_logprobs": {"type": "integer", "minimum": 0, "maximum": MOST},
    },
    {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32},
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/chat/completions", openapi_extra=_BODY, responses=documents.responses())
    async def chat_completions(request: Request) -> Response:
        call = await gateway.begin(request)
        chat = read_chat(call)
        if chat.ask.stream:
            return EventStream(stream_chat(call, chat), call.explain, settings=gateway.settings, headers=call.headers)
        answer = await unless_gone(request, complete_chat(call, chat))
        return Response(answer.model_dump_json(exclude_unset=True), headers=call.headers, media_type="application/json")

    return router
