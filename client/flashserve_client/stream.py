"""`AsyncStream`: one request from its first byte to its result, over either protocol."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from types import TracebackType

from .deadline import Deadline
from .errors import Cancelled, ConnectionFailed, FlashserveError, InternalError, Unavailable
from .logprobs import TokenLogprobs, prompt_from_json, tokens_from_json
from .request import InferRequest
from .results import Completion, Delta, GenerateResult, PromptProgress, Timings
from .transport import Chunk, Reader, Transport

# The server ends a late request itself and says so; only when it does not, the client does.
CLIENT_GRACE_S = 1.0
_MAX_RETRY_WAIT_S = 30.0
_RUNNING = (None, "None")


class _Sample:
    """What came of one of a request's samples."""

    __slots__ = ("_completion_tokens", "_texts", "finish_reason", "index")

    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._texts: list[str] = []
        self._completion_tokens = 0

    def take(self, chunk: Chunk, progress: PromptProgress | None, logprobs: tuple[TokenLogprobs, ...]) -> Delta | None:
        """Books its part of a response; None where there is nothing new of it."""
        text, tokens = chunk.text, chunk.output_tokens or 0
        reason = None if chunk.finish_reason in _RUNNING else chunk.finish_reason
        if self.finish_reason is not None or not (text or tokens or reason or progress or logprobs):
            return None  # one that has ended says so again with each piece of the others
        self.finish_reason = reason
        self._texts.append(text)
        self._completion_tokens += tokens
        return Delta(text, tokens, reason, self.index, progress, logprobs)

    def snapshot(self) -> Completion:
        return Completion(self.index, "".join(self._texts), self._completion_tokens, self.finish_reason)


class AsyncStream:
    """An asynchronous iterator of `Delta`; `result` holds the whole answer once it is exhausted.

    Nothing is sent before the first step. The request ends on the server too when the stream is closed
    (`aclose()`, `async with`), when the task that waits for it is cancelled, or when it is dropped. It is to be used
    by one task at a time.

    Raises, while iterating: a FlashserveError, whose `partial` is what had come before.
    """

    def __init__(self, transport: Transport, request: InferRequest, timeout_s: float | None, retries: int) -> None:
        self.request_id = request.request_id
        self._transport = transport
        self._request = request
        self._timeout_s = timeout_s
        self._retries_left = retries
        self._reader: Reader | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._deadline: Deadline | None = None
        self._ended = False
        self._error: FlashserveError | None = None
        self._samples = [_Sample(index) for index in range(request.samples)]
        self._pending: deque[Delta] = deque()
        self._prompt_tokens = 0
        self._timings = Timings()
        self._logprobs: list[TokenLogprobs] | None = None
        self._cumulative_logprob: float | None = None
        self._prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
        self._started = self._last = self._first = 0.0

    @property
    def finished(self) -> bool:
        """Whether the last piece has come, so that there is a `result`."""
        return all(sample.finish_reason is not None for sample in self._samples)

    @property
    def result(self) -> GenerateResult:
        """The whole answer. RuntimeError before its last piece has come."""
        if not self.finished:
            raise RuntimeError("the stream has no result yet: it was not read to its end")
        return self._snapshot()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            if self._error is not None:
                raise self._error
            raise StopAsyncIteration
        try:
            if self._deadline is None:
                self._deadline = self._start()
            with self._deadline:
                delta = await self._next()
        except BaseException as error:
            if isinstance(error, FlashserveError):
                error.partial = self._snapshot()
                self._error = error
            await self.aclose()
            raise
        if delta is None:
            await self.aclose()
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Ends the request if it still runs. May be called at any time, several times, and by any task.

        Who reads on, then or at the moment, gets Cancelled, unless the answer was complete.
        """
        self._ended = True
        if self._error is None and not self.finished:
            self._error = Cancelled("the stream was closed")
            self._error.partial = self._snapshot()
        reader, self._reader = self._reader, None
        if self._deadline is not None:
            self._deadline.cancel()
            if self._error is not None:
                self._deadline.interrupt(self._error)
        if reader is not None:
            await reader.aclose()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        reader, loop = self._reader, self._loop
        if reader is not None and loop is not None and not loop.is_closed():
            # From whichever thread the collector runs in. RuntimeError: the loop closed meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(_close_later, loop, reader)

    def _start(self) -> Deadline:
        self._loop = asyncio.get_running_loop()
        self._started = self._last = time.perf_counter()
        self._reader = self._transport.open(self._request)
        return Deadline(None if self._timeout_s is None else self._timeout_s + CLIENT_GRACE_S)

    async def _next(self) -> Delta | None:
        while not self._pending:
            assert self._reader is not None
            try:
                chunk = await self._reader.read()
            except Unavailable as error:
                await self._wait_to_retry(error)
                continue
            if chunk is None:
                if not self.finished:
                    raise ConnectionFailed("the answer ended without a finish reason: it is not complete")
                return None
            self._take(chunk)
        return self._pending.popleft()

    def _take(self, chunk: Chunk) -> None:
        """Books a response. A keep-alive, which carries no text and no token, becomes no piece."""
        pieces = (chunk, *chunk.others)
        if len(pieces) != len(self._samples):
            raise InternalError(f"the server sent {len(pieces)} texts, {len(self._samples)} were asked for")
        try:
            progress = PromptProgress.from_json(chunk.progress) if chunk.progress else None
            if chunk.metrics:
                self._timings = Timings.from_json(chunk.metrics)
        except ValueError as error:
            raise InternalError(f"the server sent figures that cannot be read ({error})") from None
        has_begun = False
        for sample, piece in zip(self._samples, pieces, strict=True):
            delta = sample.take(piece, None if sample.index else progress, self._take_logprobs(piece, sample.index))
            if delta is not None:
                self._pending.append(delta)
                has_begun |= bool(delta.text or delta.completion_tokens or delta.finish_reason)
        if self._pending:
            self._last = time.perf_counter()
        if has_begun and not self._first:
            self._first = self._last
        if chunk.input_tokens is not None:
            self._prompt_tokens = chunk.input_tokens

    def _take_logprobs(self, piece: Chunk, index: int) -> tuple[TokenLogprobs, ...]:
        """Those of a sample's part of a response; the result keeps the first sample's."""
        if piece.cumulative_logprob is not None:
            self._cumulative_logprob = piece.cumulative_logprob
        try:
            if piece.prompt_logprobs is not None:
                self._prompt_logprobs = prompt_from_json(piece.prompt_logprobs)
            if piece.logprobs is None:
                return ()
            found = tokens_from_json(piece.logprobs)
        except ValueError as error:
            raise InternalError(f"the server sent log-probabilities that cannot be read ({error})") from None
        if index == 0:
            self._logprobs = [*(self._logprobs or ()), *found]
        return found

    async def _wait_to_retry(self, error: Unavailable) -> None:
        """Waits and prepares the request anew; raises `error` when it may not be sent again."""
        if self._first or self._retries_left <= 0 or self._reader is None or self._deadline is None:
            raise error
        self._retries_left -= 1
        wait_s = (error.retry_after_ms if error.retry_after_ms is not None else 250) / 1000
        # Up to a tenth more: those who were refused together should not come back together.
        wait_s = min(wait_s, _MAX_RETRY_WAIT_S) * (1 + 0.1 * random.random())
        request, remaining = self._request, self._deadline.remaining()
        if remaining is not None:
            remaining -= CLIENT_GRACE_S + wait_s
            if remaining <= 0:
                raise error
            request = request.with_timeout(remaining)
        await self._reader.aclose()
        await asyncio.sleep(wait_s)
        self._reader = self._transport.open(request)

    def _snapshot(self) -> GenerateResult:
        completions = tuple(sample.snapshot() for sample in self._samples)
        return GenerateResult(
            text=completions[0].text,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=sum(one.completion_tokens for one in completions),
            finish_reason=completions[0].finish_reason,
            timings=self._timings,
            ttft_s=self._first - self._started if self._first else None,
            latency_s=self._last - self._started,
            request_id=self.request_id,
            completions=completions,
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            cumulative_logprob=self._cumulative_logprob,
            prompt_logprobs=self._prompt_logprobs,
        )


_closing: set[asyncio.Task[None]] = set()


def _close_later(loop: asyncio.AbstractEventLoop, reader: Reader) -> None:
    task = loop.create_task(reader.aclose())
    _closing.add(task)  # the loop itself keeps only weak references to tasks
    task.add_done_callback(_closing.discard)
