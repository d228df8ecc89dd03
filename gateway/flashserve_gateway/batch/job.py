"""One batch at work: its lines are checked, answered a few at a time, and their answers made into files.

What is on the disk is enough to go on after any end of this process: the batch's record says how far it was, its two
journals which lines have an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
from openai.types import Batch, BatchError, BatchRequestCounts
from openai.types.batch import Errors

from flashserve_client.request import new_request_id

from ..errors import ApiError, error_object
from ..settings import Limits
from .files import FileStore
from .lines import BatchLine, Journal, check_lines, read_lines
from .records import Records

log = logging.getLogger("flashserve_gateway")

UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
_RETRIED = (429, 503)
_MOST_TRIES = 10
"""Of a line with which the engine ends: it may be the reason. Full queues and models that are away do not count."""
_RETRY_S = (0.5, 30.0)
_READ_LINES = 64

Answering = Callable[[dict[str, Any], str], Awaitable[bytes]]
"""From a request's body and id to the JSON of its answer. Raises ApiError."""


class Job:
    """The one writer of a batch. ``answer`` answers one line; ``slots`` are shared by all batches."""

    def __init__(
        self, owner: str, batch: Batch, lifetime_s: int, *, records: Records[Batch], files: FileStore,
        answer: Answering, slots: asyncio.Semaphore, limits: Limits, count: Callable[[str], None],
    ) -> None:  # fmt: skip
        """``count`` is told "completed" or "failed" for each line."""
        self.owner = owner
        self._batch = batch
        self._lifetime_s = lifetime_s
        self._records = records
        self._files = files
        self._answer = answer
        self._slots = slots
        self._limits = limits
        self._count = count
        self._journals = {name: Journal(files.path(journal_id(batch.id, name))) for name in ("output", "error")}
        self._answering: asyncio.Task[None] | None = None

    @property
    def batch(self) -> Batch:
        """As it is now."""
        if self._batch.status in ("in_progress", "finalizing", "cancelling"):
            total = self._batch.request_counts.total if self._batch.request_counts is not None else 0
            return self._batch.model_copy(update={"request_counts": self._counts(total)})
        return self._batch

    @property
    def left(self) -> int:
        """Lines without an answer."""
        counts = self.batch.request_counts
        return 0 if counts is None else counts.total - counts.completed - counts.failed

    async def cancel(self) -> Batch:
        """Ends it soon. Raises ApiError if it is over, or nearly."""
        if self._batch.status not in ("validating", "in_progress", "cancelling"):
            raise ApiError(400, f"a batch that is {self._batch.status} cannot be cancelled", code="invalid_status")
        if self._batch.status != "cancelling":
            saving = self._change("cancelling")
            if self._answering is not None:
                self._answering.cancel()
            await saving
        return self.batch

    async def run(self) -> None:
        """Until its end. When it is cancelled itself, the next start of the gateway goes on."""
        try:
            await self._work()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("batch %s failed", self._batch.id)
            words = f"the gateway failed ({type(error).__name__}); its log has the reason under {self._batch.id}"
            with contextlib.suppress(OSError):  # a disk that is full, mostly
                await self._publish()
            with contextlib.suppress(OSError):
                await self._fail([BatchError(code="internal_error", message=words)])
        finally:
            for journal in self._journals.values():
                journal.close()

    async def _work(self) -> None:
        path = self._files.path(self._batch.input_file_id)
        if self._batch.status == "validating":
            total, errors = await asyncio.to_thread(check_lines, path, self._batch.endpoint, self._limits)
            if errors:
                await self._fail(errors)
                return
            status = "cancelling" if self._batch.status == "cancelling" else "in_progress"
            await self._change(status, request_counts=BatchRequestCounts(completed=0, failed=0, total=total))
        opened = [await asyncio.to_thread(journal.open) for journal in self._journals.values()]
        done = set().union(*opened)
        await self._answer_in_time(path, done)
        reason = ""
        if self._batch.status == "cancelling":
            reason = "batch_cancelled"
        elif self.left:
            reason = "batch_expired"
        else:
            await self._change("finalizing")
        if reason:
            await asyncio.to_thread(self._give_up, path, done, reason)
        await self._publish()
        await self._change({"": "completed", "batch_cancelled": "cancelled", "batch_expired": "expired"}[reason])

    async def _answer_in_time(self, path: Path, done: set[str]) -> None:
        """Returns when all lines are answered, the batch is cancelled, or its time is over."""
        assert self._batch.expires_at is not None
        if self._batch.status != "in_progress":
            return
        self._answering = asyncio.create_task(self._answer_all(path, done))
        try:
            await asyncio.wait([self._answering], timeout=max(0.0, self._batch.expires_at - time.time()))
            if self._answering.done() and not self._answering.cancelled():
                self._answering.result()
        finally:
            self._answering.cancel()
            await asyncio.gather(self._answering, return_exceptions=True)

    async def _answer_all(self, path: Path, done: set[str]) -> None:
        """Answers what is not ``done`` and adds it there."""
        places = asyncio.Semaphore(self._limits.batch_requests_at_once)
        running: set[asyncio.Task[None]] = set()
        lines = (line for line in read_lines(path, self._batch.endpoint, self._limits) if line.custom_id not in done)
        try:
            while some := await asyncio.to_thread(_next_lines, lines):
                for line in some:
                    await places.acquire()
                    task = asyncio.create_task(self._answer_line(line, done))
                    task.add_done_callback(lambda _: places.release())
                    ended = {task for task in running if task.done()}
                    for one in ended:
                        one.result()  # raises what must end the batch: a disk that is full
                    running = (running - ended) | {task}
            for one in list(running):
                await one
        finally:
            for one in running:
                one.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer_line(self, line: BatchLine, done: set[str]) -> None:
        tries = 0
        for attempt in itertools.count():
            request_id = new_request_id()
            async with self._slots:
                try:
                    answer = await self._answer(line.body, request_id)
                except ApiError as error:
                    tries += not error.is_full and error.status != 429 and error.code != "model_unavailable"
                    if error.status in _RETRIED and tries < _MOST_TRIES:
                        wait_s = max(error.retry_after_s or 0.0, min(_RETRY_S[0] * 2**attempt, _RETRY_S[1]))
                    else:
                        body = orjson.dumps({"error": error_object(error)})
                        self._write("error", line, done, _response(error.status, request_id, body))
                        return
                else:
                    self._write("output", line, done, _response(200, request_id, answer))
                    return
            await asyncio.sleep(wait_s)  # the slot is free meanwhile: others may ask another model

    def _write(self, name: str, line: BatchLine, done: set[str], answer: dict[str, Any]) -> None:
        self._journals[name].add({"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, **answer})
        done.add(line.custom_id)
        self._count("completed" if name == "output" else "failed")

    def _give_up(self, path: Path, done: set[str], code: str) -> None:
        """Says of each line that has no answer why."""
        words = "the batch was cancelled" if code == "batch_cancelled" else "the batch's time was over"
        answer = {"response": None, "error": {"code": code, "message": f"{words} before this request was answered"}}
        for line in read_lines(path, self._batch.endpoint, self._limits):
            if line.custom_id not in done:
                self._write("error", line, done, answer)

    async def _publish(self) -> None:
        """Makes files of the journals that have lines."""
        for name, journal in self._journals.items():
            await asyncio.to_thread(journal.sync)
            if journal.count:
                file_id = journal_id(self._batch.id, name)
                filename = f"{self._batch.id}_{name}.jsonl"
                await self._files.publish(self.owner, file_id, filename, "batch_output", self._lifetime_s)
                self._batch = self._batch.model_copy(update={f"{name}_file_id": file_id})

    async def _fail(self, errors: list[BatchError]) -> None:
        await self._change("failed", errors=Errors(object="list", data=errors))

    def _counts(self, total: int) -> BatchRequestCounts:
        completed, failed = (journal.count for journal in self._journals.values())
        return BatchRequestCounts(completed=completed, failed=failed, total=total)

    def _change(self, status: str, **fields: Any) -> Awaitable[None]:
        """The batch is in the new status at once, and on the disk when what is returned was awaited."""
        now = int(time.time())
        fields = {"status": status, f"{status}_at": now, "request_counts": self.batch.request_counts, **fields}
        self._batch = self._batch.model_copy(update=fields)
        return self._records.put(self.owner, self._batch)


def journal_id(batch_id: str, name: str) -> str:
    """The id that a batch's output or errors will have as a file."""
    return f"file-{batch_id.removeprefix('batch_')}-{name}"


def _response(status: int, request_id: str, body: bytes) -> dict[str, Any]:
    return {"response": {"status_code": status, "request_id": request_id, "body": orjson.Fragment(body)}, "error": None}


def _next_lines(lines: Iterator[BatchLine]) -> list[BatchLine]:
    return list(itertools.islice(lines, _READ_LINES))
