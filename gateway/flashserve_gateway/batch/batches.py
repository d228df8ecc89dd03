"""All batches of a gateway, and the files that belong to them."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping
from typing import Any

import orjson
from openai.types import Batch

from .. import parameters
from ..chat import complete_chat, read_chat
from ..completions import complete, read_completion
from ..embeddings import embed, read_embeddings
from ..errors import ApiError, internal_error, invalid
from ..gateway import Call, Gateway
from ..keys import Caller
from .files import LIFETIME_S, LONGEST_S, SHORTEST_S, FileStore
from .job import UNFINISHED, Job, journal_id
from .records import Records, lock_folder

log = logging.getLogger("flashserve_gateway")

PRIORITY = 1 << 30
"""Of batches' requests in the engines: after all others, unless a key or a request wants to come later still."""
_WINDOW = "24h"
_WINDOW_S = 24 * 3600
_FIELDS = frozenset({"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"})
_LOOK_S = 600.0


async def _chat(call: Call) -> bytes:
    return (await complete_chat(call, read_chat(call))).model_dump_json(exclude_unset=True).encode()


async def _completion(call: Call) -> bytes:
    return (await complete(call, read_completion(call))).model_dump_json(exclude_unset=True).encode()


async def _embedding(call: Call) -> bytes:
    return orjson.dumps(await embed(call, read_embeddings(call)))


ENDPOINTS = {"/v1/chat/completions": _chat, "/v1/completions": _completion, "/v1/embeddings": _embedding}


class Batches:
    """One per gateway. The folder is made, and locked, when the first file comes, or when it is there at the start."""

    def __init__(self, gateway: Gateway) -> None:
        """Raises DataFolderError."""
        assert gateway.settings.data_dir is not None
        self._gateway = gateway
        self._limits = gateway.settings.limits
        self._folder = gateway.settings.data_dir
        self._files = FileStore(self._folder / "files", self._limits)
        self._records = Records(self._folder / "batches", Batch)
        self._slots = asyncio.Semaphore(self._limits.batch_requests_at_once)
        self._jobs: dict[str, tuple[Job, asyncio.Task[None]]] = {}
        self._lock: int | None = None
        self._keeper: asyncio.Task[None] | None = None
        gateway.metrics.watch("batches", "Batches that are not finished", lambda: len(self._jobs))
        gateway.metrics.watch("batch_requests_waiting", "Requests of batches without an answer", self._left)

        if self._folder.is_dir():
            self._claim()

    def start(self) -> None:
        """Goes on with what an earlier gateway left."""
        if self._lock is None:
            return
        for owner, batch in self._records:
            if batch.status in UNFINISHED:
                self._begin(owner, batch)
        self._keeper = asyncio.create_task(self._keep_tidy())

    async def aclose(self) -> None:
        """Stops; the next start goes on."""
        tasks = [task for _, task in self._jobs.values()] + ([] if self._keeper is None else [self._keeper])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def files(self) -> FileStore:
        """What is there; nothing is written to it before `ready`."""
        return self._files

    def ready(self) -> None:
        """Makes the folder, if it is not there. Raises DataFolderError."""
        if self._lock is None:
            self._claim()
            self.start()

    async def create(self, caller: Caller, body: Mapping[str, Any]) -> Batch:
        """Begins a batch. Raises ApiError."""
        for name in body:
            if name not in _FIELDS:
                raise invalid(name[:64], f"unknown parameter {name[:64]!r}", "unknown_parameter")
        owner = caller.key.name
        endpoint = parameters.read(body, "endpoint", str, "")
        if endpoint not in ENDPOINTS:
            raise invalid("endpoint", f"endpoint must be one of {', '.join(ENDPOINTS)}")
        if body.get("completion_window") != _WINDOW:
            raise invalid("completion_window", f"completion_window must be {_WINDOW!r}")
        try:
            source = self._files.find(owner, parameters.read(body, "input_file_id", str, ""))
        except ApiError as error:
            raise invalid("input_file_id", error.message, "not_found") from None
        if source.purpose != "batch":
            raise invalid("input_file_id", f"{source.id} was not uploaded with purpose batch")
        read_lifetime(body.get("output_expires_after"), "output_expires_after")
        if sum(job.owner == owner for job, _ in self._jobs.values()) >= self._limits.batches:
            raise ApiError(
                429, f"a key may have {self._limits.batches} unfinished batches", code="rate_limit_exceeded",
                retry_after_s=60.0,
            )  # fmt: skip
        now = int(time.time())
        fields = {"id": f"batch_{secrets.token_hex(12)}", "object": "batch", "endpoint": endpoint, "created_at": now,
                  "input_file_id": source.id, "completion_window": _WINDOW, "status": "validating",
                  "expires_at": now + _WINDOW_S, "metadata": _metadata(body),
                  "output_expires_after": body.get("output_expires_after"),
                  "request_counts": {"total": 0, "completed": 0, "failed": 0}}  # fmt: skip
        batch = Batch.model_validate(fields)
        await self._records.put(owner, batch)
        self._begin(owner, batch)
        return batch

    def find(self, owner: str, batch_id: str) -> Batch:
        """Raises ApiError for one that is not there, or not the owner's."""
        batch = self._records.find(owner, batch_id)
        if batch is None:
            raise ApiError(404, f"no batch {batch_id[:100]!r}", param="batch_id", code="not_found")
        running = self._jobs.get(batch_id)
        return batch if running is None else running[0].batch

    def of(self, owner: str) -> list[Batch]:
        """The newest first."""
        return [self.find(owner, batch.id) for batch in self._records.of(owner)]

    async def cancel(self, owner: str, batch_id: str) -> Batch:
        """Raises ApiError, also for one that is over."""
        batch = self.find(owner, batch_id)
        if batch_id in self._jobs:
            return await self._jobs[batch_id][0].cancel()
        raise ApiError(400, f"a batch that is {batch.status} cannot be cancelled", code="invalid_status")

    async def remove_file(self, owner: str, file_id: str) -> None:
        """Raises ApiError, also for what an unfinished batch reads."""
        file = self._files.find(owner, file_id)
        if file.id in self._needed():
            raise ApiError(400, f"{file.id} is the input of an unfinished batch", param="file_id", code="file_in_use")
        await self._files.remove(file.id)

    def _claim(self) -> None:
        self._lock = lock_folder(self._folder)
        self._records.load()
        self._files.load(self._needed())

    def _begin(self, owner: str, batch: Batch) -> None:
        async def answer(body: dict[str, Any], request_id: str) -> bytes:
            return await self._answer(owner, batch.endpoint, body, request_id)

        # Types of the openai package keep fields that they do not name.
        lifetime_s = read_lifetime((batch.model_extra or {}).get("output_expires_after"), "output_expires_after")
        job = Job(
            owner, batch, lifetime_s, records=self._records, files=self._files,
            answer=answer, slots=self._slots, limits=self._limits, count=self._count,
        )  # fmt: skip
        task = asyncio.create_task(job.run())
        task.add_done_callback(lambda _: self._jobs.pop(batch.id, None))
        self._jobs[batch.id] = (job, task)

    async def _answer(self, owner: str, endpoint: str, body: dict[str, Any], request_id: str) -> bytes:
        """One line's answer. Raises ApiError."""
        caller = self._gateway.keyring.named(owner)
        if caller is None:
            raise ApiError(401, "the key that made this batch is no longer known", code="invalid_api_key")
        priority = body.get("priority")
        if priority is None or type(priority) is int:
            body = {**body, "priority": max(priority or 0, PRIORITY)}
        call = Call(self._gateway, request_id, caller, body, in_background=True)
        try:
            return await ENDPOINTS[endpoint](call)
        except (ApiError, asyncio.CancelledError):
            raise
        except Exception:
            log.exception("request %s of a batch failed", request_id)
            raise internal_error(request_id) from None

    def _count(self, outcome: str) -> None:
        self._gateway.metrics.batch_requests.labels(outcome).inc()

    def _left(self) -> int:
        return sum(job.left for job, _ in self._jobs.values())

    def _needed(self) -> set[str]:
        """Ids of files that unfinished batches read or will be."""
        needed = set()
        for _, batch in self._records:
            if batch.status in UNFINISHED:
                needed |= {batch.input_file_id, journal_id(batch.id, "output"), journal_id(batch.id, "error")}
        return needed

    async def _keep_tidy(self) -> None:
        while True:
            try:
                await self._files.remove_old(self._needed())
                for _, batch in self._records:
                    if batch.id not in self._jobs and batch.created_at + LONGEST_S + _WINDOW_S < time.time():
                        await self._records.remove(batch.id)
            except OSError as error:
                log.warning("old files stay: %s", error)
            await asyncio.sleep(_LOOK_S)


def read_lifetime(value: Any, name: str) -> int:
    """Seconds from `{"anchor": "created_at", "seconds": N}`; 30 days for None. Raises ApiError."""
    if value is None:
        return LIFETIME_S
    if not isinstance(value, dict) or set(value) != {"anchor", "seconds"} or value["anchor"] != "created_at":
        raise invalid(name, f"{name} must be an object of anchor, which is 'created_at', and seconds")
    seconds = value["seconds"]
    if type(seconds) is not int or not SHORTEST_S <= seconds <= LONGEST_S:
        raise invalid(f"{name}.seconds", f"{name}.seconds must be an integer in [{SHORTEST_S}, {LONGEST_S}]")
    return seconds


def _metadata(body: Mapping[str, Any]) -> dict[str, str] | None:
    metadata = body.get("metadata")
    if metadata is None:
        return None
    is_right = isinstance(metadata, dict) and len(metadata) <= 16
    if not is_right or any(len(k) > 64 or not isinstance(v, str) or len(v) > 512 for k, v in metadata.items()):
        raise invalid("metadata", "metadata: at most 16 names of 64 characters, with strings of 512")
    return dict(metadata)
