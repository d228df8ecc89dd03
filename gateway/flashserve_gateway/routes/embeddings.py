"""/v1/embeddings."""

from __future__ import annotations

import orjson
from fastapi import APIRouter, Request, Response

from ..embeddings import embed, read_embeddings
from ..gateway import Gateway
from ..incoming import unless_gone
from . import documents

_IDS = {"type": "array", "items": {"type": "integer"}}
_INPUT = {"anyOf": [{"type": "string"}, _IDS]}
_BODY = documents.body(
    {"model": {"type": "string"}, "input": {"anyOf": [*_INPUT["anyOf"], {"type": "array", "items": _INPUT}]}},
    {
        "encoding_format": {"enum": ["float", "base64"], "default": "float"},
        "dimensions": {"type": "integer", "minimum": 1},
        "pooling": {"enum": ["last", "mean", "cls"], "default": "last"},
        "normalize": {"type": "boolean", "default": True},
    },
    {"model": "smollm2", "input": ["a red fox", "a brown bear"]},
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/embeddings", openapi_extra=_BODY, responses=documents.responses())
    async def embeddings(request: Request) -> Response:
        call = await gateway.begin(request)
        answer = await unless_gone(request, embed(call, read_embeddings(call)))
        return Response(orjson.dumps(answer), media_type="application/json")

    return router
