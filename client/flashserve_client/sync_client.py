"""`Client`: `AsyncClient` for code without an event loop, on a loop in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping
from concurrent import futures
from functools import wraps
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from .async_client import AsyncClient
from .connect import DEFAULT_URL
from .errors import Cancelled
from .request import DEFAULT_MODEL
from .results import Delta, GenerateResult
from .stream import AsyncStream

P = ParamSpec("P")
T = TypeVar("T")

_CLOSE_TIMEOUT_S = 5.0
# A consumer that stalls keeps this many pieces here; beyond, flow control reaches the server, which then merges.
_MAX_BUFFERED = 1024
_BUFFER_POLL_S = 0.01


class _End:
    """The last item of a stream's queue."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Stream:
    """An iterator of `Delta`; `result` holds the whole answer once it is exhausted.

    Leaving it (`close()`, `with`, dropping it after a `break`) ends the request on the server too. Nothing is sent
    before the first step. It is to be used by one thread at a time.
    """

    def __init__(self, stream: AsyncStream, loop: _LoopThread) -> None:
        self.request_id = stream.request_id
        self._stream = stream
        self._loop = loop
        # The pump knows the queue and not this object, so that dropping this object ends the pump.
        self._queue: SimpleQueue[Delta | _End] = SimpleQueue()
        self._pump: futures.Future[None] | None = None
        self._ended = False
        self._error: BaseException | None = None

    @property
    def finished(self) -> bool:
        """Whether the last piece has come, so that there is a `result`."""
        return self._stream.finished

    @property
    def result(self) -> GenerateResult:
        """The whole answer. RuntimeError before its last piece has come."""
        return self._stream.result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Delta:
        if self._ended:
            if self._error is not None:
                raise self._error
            raise StopIteration
        if self._pump is None:
            self._pump = self._loop.start(_pump(self._stream, self._queue))
        try:
            item = self._queue.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if type(item) is not _End:
            return item  # type: ignore[return-value]
        self._ended, self._error = True, item.error
        return self.__next__()

    def close(self) -> None:
        """Ends the request if it still runs; returns when the server has been told. May be called several times."""
        if not self._ended and not self.finished:
            self._error = Cancelled("the stream was closed")
        self._ended = True
        if self._pump is not None and not self._pump.done():
            with contextlib.suppress(RuntimeError):  # the client is closed already
                self._loop.wait(self._stream.aclose())

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._pump is not None:
            self._pump.cancel()


async def _pump(stream: AsyncStream, queue: SimpleQueue[Delta | _End]) -> None:
    """Moves pieces into the queue: 7 µs each, where a call into the loop per piece costs 50."""
    error: BaseException | None = None
    try:
        async for delta in stream:
            queue.put(delta)
            while queue.qsize() >= _MAX_BUFFERED:
                await asyncio.sleep(_BUFFER_POLL_S)
    except asyncio.CancelledError:
        error = Cancelled("the stream was closed")
    except BaseException as raised:
        error = raised
    finally:
        await stream.aclose()
        queue.put(_End(error))


class _LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=(self._loop,), name="flashserve-client", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> futures.Future[T]:
        """Runs a coroutine; cancelling the future cancels it."""
        if self._loop.is_closed() or not self._thread.is_alive():
            work.close()
            raise RuntimeError("the client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine and waits for it; Ctrl-C cancels it."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Runs `last`, then ends the loop and its thread; each within _CLOSE_TIMEOUT_S."""
        if self._loop.is_closed() or not self._thread.is_alive():
            last.close()
            return
        future = asyncio.run_coroutine_threadsafe(last, self._loop)
        inside = threading.current_thread() is self._thread  # the collector may run anywhere
        if not inside:
            with contextlib.suppress(Exception, futures.CancelledError):
                future.result(_CLOSE_TIMEOUT_S)
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        if not inside:
            self._thread.join(_CLOSE_TIMEOUT_S)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S / 2))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def _shut_down(loop: _LoopThread, client: AsyncClient) -> None:
    loop.close(client.aclose())


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Client, P], T]:
    """A method of `AsyncClient` as one of `Client`: with its signature, and waited for."""

    @wraps(method)
    def call(self: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._loop.wait(method(self._client, *args, **kwargs))

    return call


def _streaming(method: Callable[Concatenate[AsyncClient, P], AsyncStream]) -> Callable[Concatenate[Client, P], Stream]:
    """Likewise for the one that gives a stream, which is to be iterated over with `for`."""

    @wraps(method)
    def call(self: Client, *args: P.args, **kwargs: P.kwargs) -> Stream:
        async def on_the_loop() -> AsyncStream:
            return method(self._client, *args, **kwargs)

        return Stream(self._loop.wait(on_the_loop()), self._loop)

    return call


class Client:
    """The synchronous client; the arguments are those of `AsyncClient`. Any number of threads may share one.

    Owns one background thread, which `close()`, `with`, the collector or the end of the program ends.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        model: str = DEFAULT_MODEL,
        timeout_s: float | None = None,
        retries: int = 0,
        headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
    ) -> None:
        self._client = AsyncClient(
            url,
            model=model,
            timeout_s=timeout_s,
            retries=retries,
            headers=headers,
            connect_timeout_s=connect_timeout_s,
        )
        self.url = self._client.url
        self._loop = _LoopThread()
        self._finalizer = weakref.finalize(self, _shut_down, self._loop, self._client)

    generate = _blocking(AsyncClient.generate)
    stream = _streaming(AsyncClient.stream)
    embed = _blocking(AsyncClient.embed)
    tokenize = _blocking(AsyncClient.tokenize)
    detokenize = _blocking(AsyncClient.detokenize)
    health = _blocking(AsyncClient.health)
    models = _blocking(AsyncClient.models)
    load_model = _blocking(AsyncClient.load_model)
    unload_model = _blocking(AsyncClient.unload_model)

    def close(self) -> None:
        """Ends the running requests, the connections and the thread, within 10 s. May be called several times."""
        self._finalizer()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
