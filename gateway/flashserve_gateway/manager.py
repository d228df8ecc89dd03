"""Which models the servers have loaded: loading, unloading, and what became of it.

A load takes seconds to minutes, so it is begun, and asked after. Triton's index says how each model of a repository
is; what this adds is what it was that a client asked for, how long it takes, and why it failed, which Triton forgets of
a model that no repository has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from flashserve_client import FlashserveError, ModelInfo

from .errors import ApiError, invalid, model_not_found
from .pool import Pool, Server

log = logging.getLogger("flashserve_gateway")

Status = Literal["ready", "loading", "unloading", "failed", "unloaded"]

MODEL_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,99}", re.ASCII)
_MAX_SOURCE_LENGTH = 1024
_UNLOADED = "unloaded"  # the reason that Triton gives for it
# Each of Triton's versions of a model has a state. Of a model's on all servers the first in this order is its own.
_STATES: tuple[tuple[str, Status], ...] = (("LOADING", "loading"), ("UNLOADING", "unloading"), ("READY", "ready"))
_CONFIG = {"backend": "flashserve"}


@dataclass(frozen=True)
class Source:
    """What a model is loaded from, if not from the servers' repositories."""

    model: str
    """A folder, a GGUF file, ``package:NAME`` or an id of the hub, on the servers' machines."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of its model.json."""

    def files(self) -> dict[str, bytes]:
        """The whole model as Triton takes it."""
        return {"1/model.json": json.dumps({**self.settings, "model": self.model}).encode()}


@dataclass
class _Change:
    """A load or unload. Its own task writes to it."""

    is_load: bool
    began: float = field(default_factory=time.monotonic)
    took_s: float | None = None
    """None while it runs."""
    reason: str = ""
    """Why it failed."""
    task: asyncio.Task[None] | None = None

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began if self.took_s is None else self.took_s


@dataclass(frozen=True)
class ModelStatus:
    """One model over all servers."""

    name: str
    status: Status
    reason: str
    """Why it failed; of every server that has another reason, one."""
    ready: int
    """On how many servers it is."""
    source: Source | None
    elapsed_s: float | None
    """So long it has been loading or unloading, if this gateway began it."""
    load_s: float | None
    """So long its last load took here."""


class ModelManager:
    """Loads and unloads on all servers. Its tasks are the only ones that write to it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._changes: dict[str, _Change] = {}
        self._sources: dict[str, Source] = {}
        self._load_s: dict[str, float] = {}

    def models(self) -> list[ModelStatus]:
        """All that a server knows or that were loaded from here, by name."""
        names = {name for server in self._pool.servers for name in server.models}
        return [self._status(name) for name in sorted(names | set(self._changes))]

    def model(self, name: str) -> ModelStatus:
        """Raises ApiError for one that nobody knows."""
        if not self._is_known(name):
            raise model_not_found(name)
        return self._status(name)

    async def load(self, name: str, source: Source | None) -> ModelStatus:
        """Begins to load a model: of the servers' repositories (or what it was loaded from before) if no ``source`` is
        given. One that is ready is loaded again, and answers meanwhile. Raises ApiError."""
        await self._pool.refresh()
        self._require_idle(name)
        source = source or self._sources.get(name)
        if source is None and not self._is_known(name):
            raise model_not_found(name)
        if source is not None and name not in self._sources and self._is_known(name):
            raise ApiError(
                409, f"there is a model {name!r}, which is not from here; choose another name", param="name",
                code="model_exists",
            )  # fmt: skip
        servers = [server for server in self._pool.servers if source is not None or name in server.models]
        self._begin(name, servers, source, is_load=True)
        return self._status(name)

    async def unload(self, name: str) -> ModelStatus:
        """Begins to unload a model; what it answers at the time ends first. One that no server has (any more) is
        forgotten. Raises ApiError."""
        await self._pool.refresh()
        if not self._is_known(name):
            raise model_not_found(name)
        self._require_idle(name)
        servers = [server for server in self._pool.servers if name in server.models]
        if servers:
            self._begin(name, servers, self._sources.get(name), is_load=False)
            return self._status(name)
        self._changes.pop(name, None)
        self._sources.pop(name, None)
        return self._status(name)

    async def aclose(self) -> None:
        """Ends waiting; a server goes on with what it was told."""
        tasks = [change.task for change in self._changes.values() if change.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _require_idle(self, name: str) -> None:
        status = self._status(name).status if self._is_known(name) else "unloaded"
        if status in ("loading", "unloading"):
            raise ApiError(409, f"the model {name!r} is {status} now", param="name", code=f"model_{status}")

    def _is_known(self, name: str) -> bool:
        return name in self._changes or any(name in server.models for server in self._pool.servers)

    def _begin(self, name: str, servers: list[Server], source: Source | None, is_load: bool) -> None:
        servers = [server for server in servers if not server.error]
        if not servers:
            raise ApiError(503, "no server can be reached", code="unreachable", retry_after_s=1.0)
        if is_load and source is not None:
            self._sources[name] = source
        change = self._changes[name] = _Change(is_load)
        change.task = asyncio.create_task(self._run(name, change, servers, source))

    async def _run(self, name: str, change: _Change, servers: list[Server], source: Source | None) -> None:
        try:
            reasons = await asyncio.gather(*(_tell(server, name, source, change.is_load) for server in servers))
            # Before it counts as done, the pool must know: it would seem unloaded again. The first of these may be one
            # that was under way.
            await self._pool.refresh()
            await self._pool.refresh()
        finally:
            change.took_s = change.elapsed_s
        found = dict.fromkeys(filter(None, reasons))
        change.reason = "; ".join(found)
        word = "loading" if change.is_load else "unloading"
        if change.reason:
            log.warning("%s %s failed after %.1f s: %s", word, name, change.took_s, change.reason)
        else:
            log.info("%s %s took %.1f s", word, name, change.took_s)
            if change.is_load:
                self._load_s[name] = change.took_s

    def _status(self, name: str) -> ModelStatus:
        infos = [server.models[name] for server in self._pool.servers if name in server.models]
        change = self._changes.get(name)
        runs = change is not None and change.took_s is None
        status, reason = _summary(infos)
        if change is not None and runs:
            status, reason = ("loading" if change.is_load else "unloading"), ""
        elif change is not None and change.reason and status != "ready":
            status, reason = "failed", change.reason
        elif change is not None and change.reason:
            reason = change.reason  # of a reload, or on some of the servers: the model answers all the same
        return ModelStatus(
            name=name,
            status=status,
            reason=reason,
            ready=sum(info.state == "READY" for info in infos),
            source=self._sources.get(name),
            elapsed_s=change.elapsed_s if change is not None and runs else None,
            load_s=self._load_s.get(name),
        )


async def _tell(server: Server, name: str, source: Source | None, is_load: bool) -> str:
    """Has one server load or unload a model; returns why it did not."""
    try:
        if not is_load:
            await server.client.unload_model(name)
        elif source is None:
            await server.client.load_model(name)
        else:
            await server.client.load_model(name, config=_CONFIG, files=source.files())
    except FlashserveError as error:
        return error.message
    return ""


def _summary(infos: list[ModelInfo]) -> tuple[Status, str]:
    for state, status in _STATES:
        if any(info.state == state for info in infos):
            return status, ""
    reasons = dict.fromkeys(info.reason for info in infos if info.reason not in ("", _UNLOADED))
    return ("failed" if reasons else "unloaded"), "; ".join(reasons)


def read_load(body: Mapping[str, Any]) -> tuple[str, Source | None]:
    """What the body of a load says. Raises ApiError."""
    for field_name in body:
        if field_name not in ("name", "model", "settings"):
            raise invalid(field_name[:64], f"unknown field {field_name[:64]!r}; there are name, model, settings")
    name, model, settings = body.get("name"), body.get("model"), body.get("settings")
    if not isinstance(name, str) or not MODEL_NAME.fullmatch(name):
        raise invalid("name", "name: 1 to 100 letters, digits, dots, dashes and underscores, not a dot or dash first")
    if settings is not None and not isinstance(settings, dict):
        raise invalid("settings", "settings must be an object with keys of model.json")
    if model is None:
        if settings:
            raise invalid("settings", "settings go with model; a model of the repository has its own")
        return name, None
    if not isinstance(model, str) or not 1 <= len(model) <= _MAX_SOURCE_LENGTH or not model.isprintable():
        words = f"model: a path, package:NAME or an id of the hub, of 1 to {_MAX_SOURCE_LENGTH} characters"
        raise invalid("model", words)
    if model.startswith((".", "~")):
        raise invalid("model", "model: a path on the server's machine is given in full, from / on")
    if settings and "model" in settings:
        raise invalid("settings.model", "settings.model: give model beside settings")
    return name, Source(model, settings or {})
