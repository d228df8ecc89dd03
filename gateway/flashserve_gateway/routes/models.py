"""/v1/models, /tokenize, /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from .. import parameters
from ..errors import invalid, model_not_found
from ..gateway import Call, Gateway
from ..incoming import unless_gone
from . import documents

_MODEL = {"model": {"type": "string"}}
_TOKENIZE = documents.body(
    _MODEL,
    {"prompt": {"type": "string"}, "messages": {"type": "array", "items": {"type": "object"}}},
    {"model": "smollm2", "prompt": "def f(x):"},
)
_DETOKENIZE = documents.body(
    {**_MODEL, "tokens": {"type": "array", "items": {"type": "integer"}}}, {}, {"model": "smollm2", "tokens": [1, 2]}
)


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["models"])

    @router.get("/v1/models", responses=documents.responses(401))
    async def list_models(request: Request) -> dict[str, Any]:
        caller = gateway.caller(request)
        rows = [_row(name, since) for name, since in gateway.pool.models.items() if caller.may_see(name)]
        return {"object": "list", "data": rows}

    @router.get("/v1/models/{name:path}", responses=documents.responses(401, 404, 503))
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        if not gateway.caller(request).may_see(name):
            raise model_not_found(name)
        await gateway.pool.require(name)
        return _row(name, gateway.pool.models[name])

    @router.post("/tokenize", openapi_extra=_TOKENIZE, responses=documents.responses())
    async def tokenize(request: Request) -> dict[str, Any]:
        call = await gateway.begin(request)
        parameters.check_names(call.body, frozenset({"model", "prompt", "messages"}))
        given = [name for name in ("prompt", "messages") if call.body.get(name) is not None]
        if len(given) != 1:
            raise invalid("prompt", "exactly one of prompt, messages is needed")
        prompt = parameters.read(call.body, "prompt", str, "") or parameters.read(call.body, "messages", list, [])
        ids = await unless_gone(request, _tokenize(call, prompt or ""))
        return {"count": len(ids), "tokens": ids}

    @router.post("/detokenize", openapi_extra=_DETOKENIZE, responses=documents.responses())
    async def detokenize(request: Request) -> dict[str, Any]:
        call = await gateway.begin(request)
        parameters.check_names(call.body, frozenset({"model", "tokens"}))
        tokens = parameters.read(call.body, "tokens", list, [])
        return {"prompt": await unless_gone(request, _detokenize(call, tokens))}

    return router


def _row(name: str, since: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": since, "owned_by": "flashserve"}


async def _tokenize(call: Call, prompt: Any) -> list[int]:
    model = parameters.read_model(call.body)
    async with call.admitted(model):
        return await call.tokenized(call.gateway.pool.tokenize(model, prompt), model)


async def _detokenize(call: Call, tokens: list[Any]) -> str:
    model = parameters.read_model(call.body)
    async with call.admitted(model):
        return await call.tokenized(call.gateway.pool.detokenize(model, tokens), model)
