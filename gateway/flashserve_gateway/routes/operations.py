"""What operators ask: /live, /ready, /health, /version, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from ..errors import ApiError
from ..gateway import Gateway
from ..metrics import CONTENT_TYPE
from ..version import VERSION
from . import documents


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/live")
    async def live() -> dict[str, str]:
        """The gateway itself runs."""
        return {"status": "live"}

    @router.get("/ready", responses={503: {"description": "no model answers"}})
    @router.get("/health", responses={503: {"description": "no model answers"}}, operation_id="health")
    async def ready(response: Response) -> dict[str, Any]:
        """Some model answers: its engine was asked for a token within the last seconds. Needs no key; where there are
        keys it names no models, which are not everybody's. `redis`, where one is used: connected or away, in which case
        the gateway goes on alone."""
        found = await gateway.pool.readiness()
        detail = found.detail
        if not gateway.keyring.is_open:
            detail = {"models": f"{found.answering} of {len(detail)} answer"}
        if not found.answering:
            response.status_code = 503
        shared = {"redis": gateway.store.state} if gateway.store.state else {}
        return {"status": "ready" if found.answering else "not ready", "detail": detail, **shared}

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}

    @router.get("/metrics", responses=documents.responses(401, 403))
    async def metrics(request: Request) -> Response:
        """In Prometheus' format. They name all models: where there are keys, one that may see all of them is needed."""
        if gateway.caller(request).key.models is not None:
            raise ApiError(403, "this key may not see every model, and so no metrics")
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE)

    return router
