"""/v1/responses: made, found again, forgotten."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from ..gateway import Gateway
from ..incoming import unless_gone
from ..responses import ResponseStore, complete_response, read_response_request, stream_response
from ..sse import EventStream
from . import documents

_BODY = documents.body(
    {"model": {"type": "string"}, "input": {"anyOf": [{"type": "string"}, {"type": "array"}]}},
    {"instructions": {"type": "string"}, "stream": {"type": "boolean"}, "store": {"type": "boolean"}},
    {"model": "smollm2", "input": "Hello", "max_output_tokens": 32},
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["OpenAI"])
    store = ResponseStore(gateway.store.responses)

    @router.post("/v1/responses", openapi_extra=_BODY, responses=documents.responses())
    async def create_response(request: Request) -> Response:
        call = await gateway.begin(request)
        wanted = await read_response_request(call, store)
        if wanted.chat.ask.stream:
            events = stream_response(call, wanted, store)
            return EventStream(
                events, call.explain, settings=gateway.settings, headers=call.headers, error_event=_error_event
            )
        answer = await unless_gone(request, complete_response(call, wanted, store))
        return Response(orjson.dumps(answer), headers=call.headers, media_type="application/json")

    @router.get("/v1/responses/{response_id}", responses=documents.responses(401, 404, 503))
    async def find_response(request: Request, response_id: str) -> dict[str, Any]:
        return (await store.find(gateway.caller(request).key.name, response_id)).response

    @router.delete("/v1/responses/{response_id}", responses=documents.responses(401, 404, 503))
    async def forget_response(request: Request, response_id: str) -> dict[str, Any]:
        await store.forget(gateway.caller(request).key.name, response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return router


def _error_event(body: bytes) -> bytes:
    error = orjson.loads(body)["error"]
    return b"event: error\ndata: " + orjson.dumps({**error, "type": "error", "sequence_number": 0}) + b"\n\n"
