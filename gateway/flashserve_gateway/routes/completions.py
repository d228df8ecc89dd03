"""/v1/completions."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from ..completions import complete, read_completion, stream_completion
from ..gateway import Gateway
from ..incoming import unless_gone
from ..logprobs import MOST
from ..sse import EventStream
from . import documents

_IDS = {"type": "array", "items": {"type": "integer"}}
_PROMPT = {"anyOf": [{"type": "string"}, _IDS]}
_BODY = documents.body(
    {"model": {"type": "string"}, "prompt": {"anyOf": [*_PROMPT["anyOf"], {"type": "array", "items": _PROMPT}]}},
    {
        **documents.SAMPLING,
        "echo": {"type": "boolean"},
        "logprobs": {"type": "integer", "minimum": 0, "maximum": MOST},
    },
    {"model": "smollm2", "prompt": "def fibonacci(n):", "max_tokens": 32},
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/completions", openapi_extra=_BODY, responses=documents.responses())
    async def completions(request: Request) -> Response:
        call = await gateway.begin(request)
        wanted = read_completion(call)
        if wanted.asks[0].stream:
            return EventStream(
                stream_completion(call, wanted), call.explain, settings=gateway.settings, headers=call.headers
            )
        answer = await unless_gone(request, complete(call, wanted))
        return Response(answer.model_dump_json(exclude_unset=True), headers=call.headers, media_type="application/json")

    return router
