"""An engine in memory behind a real gateway: a transport that answers as a test says, and a gateway on a port."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

from flashserve_client import AsyncClient, ModelInfo
from flashserve_client.request import InferRequest
from flashserve_client.transport import NO_FILES, Chunk
from flashserve_gateway.app import create_app
from flashserve_gateway.overload import Lines
from flashserve_gateway.pool import Pool
from flashserve_gateway.protocol import bounded_protocol
from flashserve_gateway.settings import Limits, Settings

Script = Callable[["Asked"], AsyncIterator[Chunk]]


@dataclass
class Asked:
    """A request as the engine saw it."""

    request: InferRequest
    ended: str = ""
    """"whole", or "cancelled"."""

    @property
    def sampling(self) -> dict[str, Any]:
        return dict(self.request.sampling or {})

    @property
    def chat(self) -> dict[str, Any]:
        return json.loads(self.request.strings["chat_request"])


def piece(text: str = "", finish: str = "None", tokens: int = 1) -> Chunk:
    metrics = '{"queue_ms": 1, "cached_tokens": 2}' if finish != "None" else None
    return Chunk(text, finish, 3, tokens, metrics)


def says(*pieces: str, finish: str = "stop") -> Script:
    """A token per piece, or all at once."""

    async def script(asked: Asked) -> AsyncIterator[Chunk]:
        if not asked.request.stream:
            yield piece("".join(pieces), finish, len(pieces))
            return
        for text in pieces[:-1]:
            yield piece(text)
        yield piece(pieces[-1], finish)

    return script


def fails(error: Exception, *before: str) -> Script:
    async def script(asked: Asked) -> AsyncIterator[Chunk]:
        for text in before:
            yield piece(text)
        raise error

    return script


async def endless(asked: Asked) -> AsyncIterator[Chunk]:
    while True:
        await asyncio.sleep(0.005)
        yield piece("x")


async def silent(asked: Asked) -> AsyncIterator[Chunk]:
    await asyncio.Event().wait()
    yield piece()


def _is_set() -> asyncio.Event:
    event = asyncio.Event()
    event.set()
    return event


@dataclass
class MemoryTransport:
    """Takes the place of a connection to tritonserver."""

    script: Script = field(default_factory=lambda: says("one ", "two ", "three"))
    names: tuple[str, ...] = ("demo",)
    asked: list[Asked] = field(default_factory=list)
    template: str = "%s"
    """Of chat messages."""
    index_error: Exception | None = None
    others: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Models of its repository that are not ready: state and reason."""
    loads: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    """Names, configurations and files of models that it was told to load."""
    may_load: asyncio.Event = field(default_factory=_is_set)
    """Loading takes until it is set."""
    load_error: Exception | None = None

    def open(self, request: InferRequest) -> MemoryReader:
        return MemoryReader(self, request)

    async def server_live(self) -> bool:
        return self.index_error is None

    async def model_ready(self, model: str) -> bool:
        return model in self.names

    async def models(self) -> list[ModelInfo]:
        if self.index_error is not None:
            raise self.index_error
        ready = [ModelInfo(name, "1", "READY", "") for name in self.names]
        return ready + [ModelInfo(name, "1", *state) for name, state in self.others.items()]

    async def load_model(self, model: str, config: str = "", files: Mapping[str, bytes] = NO_FILES) -> None:
        self.loads.append((model, config, dict(files)))
        await self.may_load.wait()
        if self.load_error is not None:
            raise self.load_error
        self.others.pop(model, None)
        self.names = tuple(dict.fromkeys((*self.names, model)))

    async def unload_model(self, model: str) -> None:
        self.names = tuple(name for name in self.names if name != model)
        if not any(name == model and files for name, _, files in self.loads):
            self.others[model] = ("UNAVAILABLE", "unloaded")

    async def aclose(self) -> None:
        pass


class MemoryReader:
    def __init__(self, transport: MemoryTransport, request: InferRequest) -> None:
        self._transport = transport
        self._request = request
        self._asked: Asked | None = None
        self._pieces: AsyncIterator[Chunk] | None = None

    async def read(self) -> Chunk | None:
        if "tokenize_request" in self._request.strings:
            return _tokenized(json.loads(self._request.strings["tokenize_request"]), self._transport.template)
        if self._pieces is None:
            self._asked = Asked(self._request)
            self._transport.asked.append(self._asked)
            self._pieces = self._transport.script(self._asked)
        try:
            return await anext(self._pieces)
        except StopAsyncIteration:
            assert self._asked is not None
            self._asked.ended = "whole"
            return None

    async def aclose(self) -> None:
        if self._asked is not None:
            self._asked.ended = self._asked.ended or "cancelled"


def _tokenized(body: dict[str, Any], template: str) -> Chunk:
    """A token per character."""
    if "token_ids" in body:
        return Chunk(json.dumps({"text": "".join(map(chr, body["token_ids"]))}))
    text = body["text"] if "text" in body else "".join(message["content"] for message in body["messages"])
    ids = [ord(character) for character in text]
    return Chunk(json.dumps({"token_ids": ids, "prompt": template % text}))


@dataclass
class Gate:
    """A running gateway. `http` asks it; `url` is for other clients."""

    url: str
    http: httpx.AsyncClient
    engine: MemoryTransport
    pool: Pool

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/chat/completions", json={**CHAT, **body})

    async def chunks(self, path: str = "/v1/chat/completions", **body: Any) -> list[dict[str, Any]]:
        """The JSON of a stream's events; fails unless it ends as it should."""
        body = {**(CHAT if "chat" in path else {"model": "demo"}), "stream": True, **body}
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        events = response.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2] if not event.startswith(":")]

    async def ended(self, number: int = -1, within_s: float = 2.0) -> str:
        """How an engine's request ended, once it has."""

        async def wait() -> str:
            while len(self.engine.asked) < max(-number, number + 1) or not self.engine.asked[number].ended:
                await asyncio.sleep(0.005)
            return self.engine.asked[number].ended

        return await asyncio.wait_for(wait(), within_s)


AT_ONCE = Settings(limits=Limits(queue_wait_s=0))
"""What an engine refuses is refused at once."""
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@contextlib.asynccontextmanager
async def gate(
    engine: MemoryTransport | None = None, settings: Settings | None = None, others: tuple[MemoryTransport, ...] = ()
) -> AsyncIterator[Gate]:
    """A gateway on a free port, in this event loop, in front of engines in memory."""
    engine, settings = engine or MemoryTransport(), settings or AT_ONCE
    clients = [AsyncClient(model="", transport=transport) for transport in (engine, *others)]
    lines = Lines(settings.limits.queue_wait_s, settings.limits.queued)
    pool = Pool(clients, settings.refresh_s, metrics=settings.triton_metrics, lines=lines)
    config = uvicorn.Config(
        create_app(settings, pool), port=0, http=bounded_protocol(settings.limits), log_config=None, access_log=False,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    await server.startup()  # not serve(), which looks ten times a second whether it is to end
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=10) as http:
            yield Gate(url, http, engine, pool)
    finally:
        await server.shutdown()


METRICS = """
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model="demo",engine="a"} 3
vllm:num_requests_running{model="demo",engine="b"} 1
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{model="demo",engine="a"} 120
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{model="demo",le="0.01"} 5
vllm:time_to_first_token_seconds_bucket{model="demo",le="+Inf"} 10
vllm:time_to_first_token_seconds_sum{model="demo"} 1
vllm:time_to_first_token_seconds_count{model="demo"} 10
# TYPE nv_other gauge
nv_other{model="other"} 5
"""


@contextlib.asynccontextmanager
async def metrics_server(asked: list[bytes]) -> AsyncIterator[str]:
    """A tritonserver's metrics; what it was asked goes into ``asked``."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(METRICS)}\r\nConnection: close\r\n\r\n"
        writer.write((head + METRICS).encode())
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
