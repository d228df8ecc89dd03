"""Real servers for the client's tests: small enough to misbehave on command, on either protocol.

A test says what the server answers as an async generator of `say(...)`, `Error` and `Garbage`; `HttpPeer`
and `GrpcPeer` put it on the wire. Both remember what they were asked and which requests were cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc


@dataclass
class Asked:
    """A request as the server saw it, in one form for both protocols."""

    model: str
    request_id: str
    inputs: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)
    cancelled: bool = False
    """The client ended it before the server was through."""
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def sampling(self) -> dict[str, Any]:
        return json.loads(self.inputs.get("sampling_parameters", "{}"))


@dataclass(frozen=True)
class Error:
    """An error message of the server, after which the stream ends."""

    message: str


@dataclass(frozen=True)
class Garbage:
    """A response that nobody can read."""


Script = Callable[[Asked], AsyncIterator[Any]]


def say(text: str = "", finish: str = "None", tokens: int = 1, **outputs: Any) -> dict[str, Any]:
    """A response of the contract."""
    return {"text_output": text, "finish_reason": finish, "num_output_tokens": tokens, "num_input_tokens": 3, **outputs}


async def words(asked: Asked) -> AsyncIterator[Any]:
    """Streams "one two three", or says it at once."""
    if not asked.inputs.get("stream"):
        yield say("one two three", "stop", 3, request_metrics='{"queue_ms": 1.5, "cached_tokens": 2, "new_one": 9}')
        return
    yield say("one ")
    yield say("two ")
    yield say("three", "stop", request_metrics='{"queue_ms": 1.5, "cached_tokens": 2, "new_one": 9}')


async def endless(asked: Asked) -> AsyncIterator[Any]:
    """A token every 10 ms, for ever."""
    while True:
        yield say("x")
        await asyncio.sleep(0.01)


async def silent(asked: Asked) -> AsyncIterator[Any]:
    """Takes the request and never answers."""
    await asyncio.Event().wait()
    yield


class Peer:
    """What both servers share. `script` may be changed at any time."""

    def __init__(self, script: Script = words) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self.controlled: list[str] = []
        self.live = self.ready = True
        self.index = [{"name": "demo", "version": "1", "state": "READY", "reason": ""}]
        self.ready_beside: list[str] = []
        """Models that are ready and that no repository knows."""
        self.given: dict[str, bytes] = {}
        """What the last load brought along."""
        self.port = 0

    def statistics(self) -> list[dict[str, str]]:
        """Of every model that is ready, as Triton has them."""
        ready = [model["name"] for model in self.index if model["state"] == "READY"]
        return [{"name": name, "version": "1"} for name in (*ready, *self.ready_beside)]

    @property
    def url(self) -> str:
        raise NotImplementedError

    async def start(self) -> None:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def __aenter__(self) -> Peer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


class GrpcPeer(Peer):
    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(self), self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(None)


# ruff: noqa: N802 - the names of the service's methods
class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    def __init__(self, peer: GrpcPeer) -> None:
        self.peer = peer

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        async for request in requests:
            inputs = {
                tensor.name: raw == b"\x01" if tensor.datatype == "BOOL" else raw[4:].decode()
                for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
            }
            asked = Asked(request.model_name, request.id, inputs, dict(context.invocation_metadata()))
            self.peer.asked.append(asked)
            script = self.peer.script(asked)
            asked.cancelled = True  # unless it gets to the end; a cancelled call may just drop this generator
            try:
                async for item in script:
                    yield _grpc_message(item)
                asked.cancelled = False
            finally:
                asked.over.set()

    async def ServerLive(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerLiveResponse(live=self.peer.live)

    async def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.peer.ready)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        return service_pb2.RepositoryIndexResponse(models=self.peer.index)

    async def ModelStatistics(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelStatisticsResponse(model_stats=self.peer.statistics())

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:
        self.peer.given = {
            name: value.bytes_param or value.string_param.encode() for name, value in request.parameters.items()
        }
        if request.model_name == "broken":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "load failed for model 'broken'")
        self.peer.controlled.append(f"load {request.model_name}")
        return service_pb2.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:
        self.peer.controlled.append(f"unload {request.model_name}")
        return service_pb2.RepositoryModelUnloadResponse()


def _grpc_message(item: Any) -> Any:
    message = service_pb2.ModelStreamInferResponse()
    if isinstance(item, Error):
        message.error_message = item.message
    elif isinstance(item, Garbage):
        message.infer_response.outputs.add(name="text_output", datatype="BYTES", shape=(1,))
        message.infer_response.raw_output_contents.append(b"\xff\xff\xff\x7fshort")
    else:
        for name, value in item.items():
            values = value if isinstance(value, list) else [value]
            kind = "BYTES" if isinstance(values[0], str) else "UINT32"
            message.infer_response.outputs.add(name=name, datatype=kind, shape=(len(values),))
            message.infer_response.raw_output_contents.append(b"".join(map(_raw, values)))
    return message


def _raw(value: str | int) -> bytes:
    if isinstance(value, int):
        return value.to_bytes(4, "little")
    content = value.encode()
    return len(content).to_bytes(4, "little") + content


class HttpPeer(Peer):
    def __init__(self, script: Script = words) -> None:
        super().__init__(script)
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for writer in self._open:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while not writer.is_closing():
                    await self._exchange(reader, writer)
        finally:
            self._open.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        _, path, _ = head.split(" ", 2)
        lines = (line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        headers = {name.lower(): value for name, value in lines}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        parts = path.strip("/").split("/")
        if parts[-1] in ("generate", "generate_stream"):
            await self._infer(parts, headers, json.loads(body), reader, writer)
        elif parts[-1] in ("load", "unload"):
            if parts[-2] == "broken":
                _reply(writer, 400, {"error": "load failed for model 'broken'"})
                return
            given = json.loads(body or "{}").get("parameters", {})
            self.given = {
                name: value.encode() if name == "config" else base64.b64decode(value) for name, value in given.items()
            }
            self.controlled.append(f"{parts[-1]} {parts[-2]}")
            _reply(writer, 200, None)
        elif parts[-1] == "index":
            _reply(writer, 200, self.index)
        elif parts[-1] == "stats":
            _reply(writer, 200, {"model_stats": self.statistics()})
        else:
            good = self.live if parts[-1] == "live" else self.ready
            _reply(writer, 200 if good else 400, None)

    async def _infer(
        self, parts: list[str], headers: dict[str, str], body: dict[str, Any], reader: Any, writer: Any
    ) -> None:
        asked = Asked(parts[-2], body.pop("id", ""), body, headers)
        self.asked.append(asked)
        answer = asyncio.ensure_future(self._answer(asked, parts[-1] == "generate_stream", writer))
        left = asyncio.ensure_future(reader.read(1))  # the end of the connection; this client never pipelines
        await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            asked.cancelled = True
            answer.cancel()
            writer.close()
        elif not left.done():
            left.cancel()
            await asyncio.wait({left})
        try:
            await answer
        except (asyncio.CancelledError, ConnectionError):
            asked.cancelled = True
        finally:
            asked.over.set()

    async def _answer(self, asked: Asked, stream: bool, writer: asyncio.StreamWriter) -> None:
        started = False
        async for item in self.script(asked):
            if isinstance(item, Garbage):
                text = "{not json"
            else:
                text = json.dumps({"error": item.message} if isinstance(item, Error) else item, ensure_ascii=False)
            if not stream or (isinstance(item, Error) and not started):
                # Triton gives the status of a stream's first error, and still writes it as an event.
                payload = f"data: {text}\n\n" if stream else text
                _reply(writer, 400 if isinstance(item, Error) else 200, payload)
                return
            if not started:
                started = True
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                    b"Transfer-Encoding: chunked\r\n\r\n"
                )
            chunk = f"data: {text}\n\n".encode()
            writer.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            await writer.drain()
        writer.write(b"0\r\n\r\n")


def _reply(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    data = b"" if body is None else (body if isinstance(body, str) else json.dumps(body)).encode()
    writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data)))
    writer.write(data)


class Relay:
    """A TCP hop in front of a server, whose connections can be cut."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._writers: list[asyncio.StreamWriter] = []
        self.url = ""

    async def __aenter__(self) -> Relay:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"{self._peer.url.split(':')[0]}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Breaks all connections, as a killed server or a lost network would."""
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._peer.port)
        self._writers += [writer, far_writer]
        with contextlib.suppress(ConnectionError):
            await asyncio.gather(_copy(reader, far_writer), _copy(far_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()


PEERS = {"grpc": GrpcPeer, "http": HttpPeer}


@contextlib.contextmanager
def peer_in_thread(kind: str, script: Script = words) -> Iterator[Peer]:
    """A server on a loop of its own, for tests of code that blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="peer")
    thread.start()
    peer = PEERS[kind](script)

    def run(work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(10)

    run(peer.start())
    try:
        yield peer
    finally:
        run(peer.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


async def until(condition: Callable[[], bool], timeout_s: float = 3.0) -> bool:
    """Waits until `condition()` holds; returns whether it did in time."""
    for _ in range(int(timeout_s / 0.01)):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return condition()
