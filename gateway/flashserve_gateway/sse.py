"""Server-sent events: a stream's bytes, and the answer that sends them.

Each piece of a stream is a constant beginning, one JSON string and a constant end: 1 µs, where OpenAI's own types take
ten (they validate the chunks in the tests).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

DONE = b"data: [DONE]\n\n"
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the pieces
}


def data(body: bytes) -> bytes:
    """An event without a name."""
    return b"data: " + body + b"\n\n"


class EventStream(Response):
    """An ASGI response that sends events as they come.

    The status is held back until the first event, or `keep_alive_s`: what the engine refuses before that has its true
    status. A client that goes away closes the generator at once.

    Args:
        events: the bytes of whole events.
        on_error: turns what that raises into an ApiError, which becomes the status or, after an event, the last event.
        error_body, error_event, keep_alive: the bytes of other protocols than OpenAI's.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[BaseException], ApiError],
        *,
        settings: Settings,
        headers: Mapping[str, str],
        error_body: Callable[[ApiError], bytes] = lambda error: error.body,
        error_event: Callable[[bytes], bytes] = lambda body: data(body),
        keep_alive: bytes = _KEEP_ALIVE,
    ) -> None:
        # Not Response.__init__, which renders a body: FastAPI only asks whether it is a Response.
        self.background = None
        self._events = events
        self._on_error = on_error
        self._sent_headers = headers
        self._keep_alive_s = settings.keep_alive_s
        self._error_body = error_body
        self._error_event = error_event
        self._keep_alive = keep_alive
        self._lock = asyncio.Lock()
        self._has_begun = self._is_over = False
        self._last = time.monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        others = [asyncio.create_task(_gone(receive)), asyncio.create_task(self._keep_open(send))]
        try:
            done, _ = await asyncio.wait([writer, *others], return_when=asyncio.FIRST_COMPLETED)
            if writer in done:
                await writer
        finally:
            for task in (writer, *others):
                task.cancel()
            await asyncio.gather(writer, *others, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                async for event in events:
                    await self._send(send, event)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            await self._fail(send, self._on_error(error))
            return
        async with self._lock:
            self._is_over = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _fail(self, send: Send, error: ApiError) -> None:
        async with self._lock:
            self._is_over = True
            body = self._error_body(error)
            if self._has_begun:
                body = self._error_event(body)
            else:
                await send(_start(error.status, {**error.headers, **self._sent_headers}))
            await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        async with self._lock:
            if self._is_over:
                return
            if not self._has_begun:
                self._has_begun = True
                await send(_start(200, {**_HEADERS, **self._sent_headers}))
            await send({"type": "http.response.body", "body": event, "more_body": True})
            self._last = time.monotonic()

    async def _keep_open(self, send: Send) -> None:
        """Comments while nothing comes, and the client reads."""
        while True:
            wait_s = self._keep_alive_s - (time.monotonic() - self._last)
            if wait_s > 0 or self._lock.locked():  # locked: what was sent before is not read yet
                await asyncio.sleep(wait_s if wait_s > 0 else self._keep_alive_s)
            else:
                await self._send(send, self._keep_alive)


def _start(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    lines = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": lines}


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _progress(progress: Mapping[str, Any]) -> bytes:
    return b',"prompt_progress":' + orjson.dumps(progress)


class ChatChunks:
    """The events of one choice of a chat.completion.chunk stream. `usage: null` stands in each if there will be one."""

    def __init__(self, answer_id: str, model: str, created: int, usage_wanted: bool, index: int = 0) -> None:
        head = orjson.dumps({"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._index = index
        self._delta = self._head + b'{"index":%d,"delta":' % index
        self._tail = (b',"usage":null' if usage_wanted else b"") + b"}\n\n"
        self._running = b',"logprobs":null,"finish_reason":null}]' + self._tail

    def role(self) -> bytes:
        """The first event."""
        return self._delta + b'{"role":"assistant","content":""}' + self._running

    def content(self, text: str) -> bytes:
        """A piece of the answer."""
        return self._delta + b'{"content":' + orjson.dumps(text) + b"}" + self._running

    def delta(self, value: Mapping[str, Any]) -> bytes:
        """Any other delta: tool calls, reasoning."""
        return self._delta + orjson.dumps(value) + self._running

    def progress(self, progress: Mapping[str, Any]) -> bytes:
        """How far the prompt is, as llama.cpp says it: beside a choice without news."""
        return self._delta + b"{}" + self._running[: -len(self._tail)] + _progress(progress) + self._tail

    def scored(self, text: str, logprobs: Mapping[str, Any]) -> bytes:
        """A piece of the answer, which may be empty, with log-probabilities."""
        delta = {"content": text} if text else {}
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._head + orjson.dumps(choice) + b"]" + self._tail

    def finish(self, reason: str) -> bytes:
        """The last choice."""
        end = orjson.dumps({"index": self._index, "delta": {}, "logprobs": None, "finish_reason": reason})
        return self._head + end + b"]" + self._tail

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """After the last choice: no choice, and the counts."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"


class CompletionChunks:
    """The same for text_completion."""

    def __init__(self, answer_id: str, model: str, created: int, usage_wanted: bool) -> None:
        head = orjson.dumps({"id": answer_id, "object": "text_completion", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._tail = (b',"usage":null' if usage_wanted else b"") + b"}\n\n"

    def text(
        self, index: int, text: str, reason: str | None = None, logprobs: Mapping[str, Any] | None = None
    ) -> bytes:
        """A piece of choice ``index``."""
        choice = orjson.dumps({"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason})
        return self._head + choice + b"]" + self._tail

    def progress(self, index: int, progress: Mapping[str, Any]) -> bytes:
        """How far the prompt of choice ``index`` is."""
        return self.text(index, "")[: -len(self._tail)] + _progress(progress) + self._tail

    def usage(self, usage: Mapping[str, Any]) -> bytes:
        """After the last choice."""
        return self._head + b'],"usage":' + orjson.dumps(usage) + b"}\n\n"
