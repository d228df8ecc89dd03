"""/v1/admin: which models are loaded. For keys with `"admin": true`; without keys, for this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request

from ..errors import invalid
from ..gateway import Gateway
from ..hub import search_hub
from ..incoming import unless_gone
from ..manager import ModelStatus, read_load
from . import documents

_LOAD = documents.body(
    {"name": {"type": "string", "pattern": "[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}"}},
    {
        "model": {"type": "string", "description": "a folder, a .gguf file, package:NAME or an id of the hub; if left "
                  "out, a model of the server's repository, or what this name was loaded from before"},
        "settings": {"type": "object", "description": "further keys of model.json"},
    },
    {"name": "qwen", "model": "Qwen/Qwen3-0.6B", "settings": {"max_model_len": 4096}},
)  # fmt: skip
_MAX_RESULTS, _DEFAULT_RESULTS, _MAX_WORDS = 50, 20, 200
_SEARCH = {
    "parameters": [
        {"name": "search", "in": "query", "schema": {"type": "string", "maxLength": _MAX_WORDS}},
        {"name": "limit", "in": "query",
         "schema": {"type": "integer", "minimum": 1, "maximum": _MAX_RESULTS, "default": _DEFAULT_RESULTS}},
    ]
}  # fmt: skip


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(prefix="/v1/admin", tags=["models"])

    @router.get("/models", responses=documents.responses(401, 403))
    async def statuses(request: Request) -> dict[str, Any]:
        """All models, loaded or not: `status` is ready, loading, unloading, failed (with the `reason`) or unloaded."""
        gateway.require_admin(request)
        return {"object": "list", "data": [await _row(gateway, status) for status in gateway.manager.models()]}

    @router.get("/models/{name}", responses=documents.responses(401, 403, 404))
    async def status(request: Request, name: str) -> dict[str, Any]:
        """One model: to be asked for until its `status` is no longer loading or unloading."""
        gateway.require_admin(request)
        return await _row(gateway, gateway.manager.model(name))

    load_errors = documents.responses(*documents.BODY, 403, 404, 409)

    @router.post("/models", status_code=202, openapi_extra=_LOAD, responses=load_errors)
    async def load(request: Request) -> dict[str, Any]:
        """Begins to load a model, on every server behind the gateway; answers at once."""
        gateway.require_admin(request)
        call = await gateway.begin(request)
        return await _row(gateway, await gateway.manager.load(*read_load(call.body)))

    @router.delete("/models/{name}", status_code=202, responses=documents.responses(401, 403, 404, 409, 503))
    async def unload(request: Request, name: str) -> dict[str, Any]:
        """Begins to unload a model. What it answers at the time ends first. One that no server has (any more), as a
        load that failed leaves it, is forgotten."""
        gateway.require_admin(request)
        return await _row(gateway, await gateway.manager.unload(name))

    @router.get("/hub", openapi_extra=_SEARCH, responses=documents.responses(400, 401, 403, 502, 503))
    async def search(request: Request) -> dict[str, Any]:
        """Text models of the Hugging Face hub that these words find, those with most downloads first."""
        gateway.require_admin(request)
        words, limit = request.query_params.get("search", ""), request.query_params.get("limit", _DEFAULT_RESULTS)
        if len(words) > _MAX_WORDS:
            raise invalid("search", f"search: at most {_MAX_WORDS} characters, not {len(words)}")
        if not str(limit).isdecimal() or not 1 <= int(str(limit)[:9]) <= _MAX_RESULTS:
            raise invalid("limit", f"limit must be an integer in [1, {_MAX_RESULTS}]")
        found = await unless_gone(request, search_hub(words, int(limit)))
        return {"object": "list", "data": [asdict(model) for model in found]}

    return router


async def _row(gateway: Gateway, status: ModelStatus) -> dict[str, Any]:
    return {
        "id": status.name,
        "object": "model",
        "status": status.status,
        "reason": status.reason,
        "servers": {"ready": status.ready, "all": len(gateway.pool.servers)},
        "model": None if status.source is None else status.source.model,
        "settings": {} if status.source is None else dict(status.source.settings),
        "elapsed_s": None if status.elapsed_s is None else round(status.elapsed_s, 1),
        "load_s": None if status.load_s is None else round(status.load_s, 1),
        "memory": (await gateway.engine_metrics.memory()).get(status.name),
    }
