"""The page at /, its files, and the figures that it shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse

from ..gateway import Gateway
from . import documents

_STATIC = Path(__file__).parents[1] / "static"
_FILES = {path.name: path for path in _STATIC.iterdir()}
_HEADERS = {
    # Whatever a model writes, the page runs its own files only and talks to its own gateway only.
    "content-security-policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
_NO_METRICS = "The gateway was not told where tritonserver's metrics are (--triton-metrics HOST:PORT)."


def routes(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(_FILES["index.html"], headers=_HEADERS)

    @router.get("/static/{name}", include_in_schema=False)
    async def file(name: str) -> FileResponse:
        if name not in _FILES:
            raise HTTPException(404)
        return FileResponse(_FILES[name], headers=_HEADERS)

    @router.get("/operations", tags=["operation"], responses=documents.responses(401))
    async def operations(request: Request) -> dict[str, Any]:
        """The figures of the page's second view."""
        caller = gateway.caller(request)
        models = {
            name: figures for name, figures in (await gateway.engine_metrics.models()).items() if caller.may_see(name)
        }
        return {
            "models": models,
            "batches": gateway.recent.pictures(caller.may_see),
            "note": "" if gateway.settings.triton_metrics else _NO_METRICS,
        }

    return router
