"""The application: routes, errors in OpenAI's shape, and what surrounds them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from flashserve_client import AsyncClient

from .answers import HEADER, AnswerCache
from .batch.batches import Batches
from .engine_metrics import EngineMetrics
from .errors import ApiError, body_for
from .gateway import Gateway
from .incoming import Bodies
from .keys import Keyring
from .manager import ModelManager
from .metrics import Metrics
from .middleware import Surround
from .overload import Lines
from .pool import Pool
from .recent import RecentRequests
from .routes import (
    admin,
    batches,
    chat,
    completions,
    embeddings,
    files,
    messages,
    models,
    operations,
    page,
    reference,
    responses,
    torchweave,
)
from .settings import Settings
from .store.interface import Store
from .store.memory import MemoryShelf, MemoryStore
from .version import VERSION

_DESCRIPTION = "OpenAI's API in front of Triton Inference Server."
_RESPONSES_S = 3600.0
_IN_MEMORY_BYTES = 64 << 20
"""Of responses, and again of answers, where no Redis keeps them."""


def create_app(settings: Settings, pool: Pool | None = None) -> FastAPI:
    """The ASGI application of one gateway.

    Args:
        pool: what answers instead of the servers that `settings.triton` names; the application ends it.

    Raises KeysFileError for a keys file that cannot be used, DataFolderError for such a folder, ValueError for a bad
    address.
    """
    if pool is None:
        clients = [AsyncClient(f"grpc://{address}", model="") for address in settings.triton]
        lines = Lines(settings.limits.queue_wait_s, settings.limits.queued)
        pool = Pool(clients, settings.refresh_s, metrics=settings.triton_metrics, lines=lines)
    metrics, store = Metrics(pool.in_flight, pool.lines.waiting), _open_store(settings)
    if store.state:
        metrics.watch("redis_connected", "1: Redis answers; 0: it is away", lambda: store.state == "connected")
    gateway = Gateway(
        settings,
        pool,
        Keyring.load(settings.keys_file),
        metrics,
        EngineMetrics(settings.triton_metrics),
        Bodies(settings.limits.bodies_bytes),
        ModelManager(pool),
        RecentRequests(),
        store,
        None if settings.cache_answers_s is None else AnswerCache(store.answers, metrics),
    )

    kept = None if settings.data_dir is None else Batches(gateway)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await gateway.store.start()
        await gateway.pool.start()
        if kept is not None:
            kept.start()
        try:
            yield
        finally:
            if kept is not None:
                await kept.aclose()
            await gateway.manager.aclose()
            await gateway.engine_metrics.aclose()
            await gateway.pool.aclose()
            await gateway.store.aclose()

    app = FastAPI(
        title="flashserve", version=VERSION, description=_DESCRIPTION, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    for module in (chat, completions, embeddings, responses, messages, torchweave, models, admin, operations, page):
        app.include_router(module.routes(gateway))
    if kept is not None:
        app.include_router(files.routes(gateway, kept))
        app.include_router(batches.routes(gateway, kept))
    app.include_router(reference.routes(app))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", HEADER],
        )
    app.add_middleware(Surround, metrics=gateway.metrics, is_private=settings.is_private)
    return app


def _open_store(settings: Settings) -> Store:
    """Raises ValueError for a bad URL."""
    answers_s = settings.cache_answers_s or 0.0
    if settings.redis is None:
        return MemoryStore(MemoryShelf(_RESPONSES_S, _IN_MEMORY_BYTES), MemoryShelf(answers_s, _IN_MEMORY_BYTES))
    from .store.redis_store import RedisStore  # redis-py is needed only here

    return RedisStore(settings.redis, _RESPONSES_S, answers_s)


async def _answer_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return Response(body_for(request.url.path, error), error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Of the framework: no such path, no such method."""
    assert isinstance(error, HTTPException)
    words = f"{request.method} {request.url.path[:200]}: {error.detail}"
    answer = ApiError(error.status_code, words)
    return Response(body_for(request.url.path, answer), answer.status, {**(error.headers or {}), **answer.headers})
