"""/v1/batches: requests that are answered when there is room."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from openai.types import Batch

from ..batch.batches import ENDPOINTS, Batches
from ..gateway import Gateway
from . import documents
from .listing import PAGE, page

_BODY = documents.body(
    {
        "input_file_id": {"type": "string"},
        "endpoint": {"enum": list(ENDPOINTS)},
        "completion_window": {"enum": ["24h"]},
    },
    {"metadata": {"type": "object", "additionalProperties": {"type": "string"}}},
    {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
)


def routes(gateway: Gateway, batches: Batches) -> APIRouter:
    router = APIRouter(tags=["batches"])

    @router.post("/v1/batches", openapi_extra=_BODY, responses=documents.responses(*documents.BODY, 429))
    async def create(request: Request) -> Batch:
        """Begins a batch: its requests run after all others, and what has an answer keeps it if the gateway ends."""
        call = await gateway.begin(request)
        return await batches.create(call.caller, call.body)

    @router.get("/v1/batches", openapi_extra=PAGE, responses=documents.responses(400, 401))
    async def list_batches(request: Request) -> dict[str, Any]:
        return page(request, batches.of(gateway.caller(request).key.name))

    @router.get("/v1/batches/{batch_id}", responses=documents.responses(401, 404))
    async def find(request: Request, batch_id: str) -> Batch:
        return batches.find(gateway.caller(request).key.name, batch_id)

    @router.post("/v1/batches/{batch_id}/cancel", responses=documents.responses(400, 401, 404))
    async def cancel(request: Request, batch_id: str) -> Batch:
        """Ends a batch; what was answered before is in its output."""
        return await batches.cancel(gateway.caller(request).key.name, batch_id)

    return router
