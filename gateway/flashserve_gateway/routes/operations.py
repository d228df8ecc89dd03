"""What operators ask: /live, /ready, /health, /version, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response

from ..gateway import Gateway
from ..metrics import CONTENT_TYPE
from ..version import VERSION


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/live")
    async def live() -> dict[str, str]:
        """The gateway itself runs."""
        return {"status": "live"}

    @router.get("/ready", responses={503: {"description": "no model answers"}})
    @router.get("/health", responses={503: {"description": "no model answers"}}, operation_id="health")
    async def ready(response: Response) -> dict[str, Any]:
        """Some model answers: its engine was asked for a token within the last seconds."""
        found = await gateway.pool.readiness()
        if not found.ready:
            response.status_code = 503
        return {"status": "ready" if found.ready else "not ready", "detail": found.detail}

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    return router
