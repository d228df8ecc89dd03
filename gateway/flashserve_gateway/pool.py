"""The servers behind the gateway: which models each has, and which of them gets a request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from flashserve_client import (
    AsyncClient,
    ConnectionFailed,
    Delta,
    EmbedResult,
    FlashserveError,
    GenerateResult,
    ModelInfo,
    Unavailable,
)
from flashserve_client.request import Prompt

from .errors import model_not_found, model_unavailable
from .fair_queue import Share
from .gauges import Gauges, read_gauges
from .overload import Lines
from .routing import Beginnings, Candidate, beginnings, order

log = logging.getLogger("flashserve_gateway")

_READY, _LOADING = "READY", "LOADING"
_NOT_ASKED = "not asked yet"
_INDEX_TIMEOUT_S = 5.0
_RENDER_TIMEOUT_S = 5.0
_LOOK_AGAIN_S = 0.5  # requests for models that nobody has must not be a question to every server each
_PROBE_TIMEOUT_S = 5.0
_PROBE_MESSAGES = [{"role": "user", "content": "hello"}]
_ENDING_LIFETIME_S = 60.0
_KNOWN_ENDINGS = 1024
_PROBE_LIFETIME_S = 2.0  # a probe is a request to the engine: a load balancer's every second must not be one each
_EVERYBODY = Share()
_NO_GAUGES = Gauges()


@dataclass(frozen=True)
class Ask:
    """One request to an engine."""

    model: str
    prompt: Prompt
    params: dict[str, Any]
    """Sampling parameters by the engine's names, and what belongs to a chat template."""
    request_id: str
    priority: int | None = None
    stream: bool = True
    """Pieces as they come; otherwise the whole in one piece."""
    embeds: bool = False
    """The answer is an embedding, in one piece without text."""

    def samples(self, count: int) -> list[Ask]:
        """The ask, `count` times: each a request of its own, with a seed of its own if there is one. They share the
        computation of their prompt through the engine's prefix cache."""
        if count == 1:
            return [self]
        asks = []
        for index in range(count):
            seed = self.params.get("seed")
            params = {**self.params, "seed": seed + index} if type(seed) is int else self.params
            asks.append(replace(self, request_id=f"{self.request_id}-{index}", params=params))
        return asks


@dataclass
class Server:
    """One tritonserver. Only the pool writes to it."""

    client: AsyncClient
    models: dict[str, ModelInfo] = field(default_factory=dict)
    """What it said when it last answered: of a model's versions the one of most use."""
    metrics: str = ""
    """HOST:PORT where it says how its engines are; empty: nowhere."""
    gauges: Mapping[str, Gauges] = field(default_factory=dict)
    """What it said there, by model."""
    in_flight: int = 0
    others: int = 0
    """Requests that it had then and that are not ours."""
    error: str = _NOT_ASKED
    """Why it cannot be used; empty if it can."""

    def gauges_of(self, model: str) -> Gauges:
        """What is known of a model's engines; where nothing is, they are taken to be well."""
        return self.gauges.get(model, _NO_GAUGES)


@dataclass(frozen=True)
class Readiness:
    """Which models answer; `detail` says of each what it said, or why there is none."""

    answering: int
    detail: dict[str, str]


class Pool:
    """Knows the servers' models, looks after them once in `refresh_s` seconds, and sends requests their way."""

    def __init__(
        self,
        clients: Sequence[AsyncClient],
        refresh_s: float = 1.0,
        *,
        metrics: Sequence[str] = (),
        lines: Lines | None = None,
    ) -> None:
        """
        Args:
            metrics: HOST:PORT of each client's server's metrics, or none at all; of a single server they are not asked.
            lines: where requests wait while engines are full; None: they do not.
        """
        self.servers = [Server(client) for client in clients]
        for server, address in zip(self.servers, metrics, strict=False):
            server.metrics = address
        self.lines = lines if lines is not None else Lines(0.0, 0)
        self._beginnings = Beginnings()
        self._http = httpx.AsyncClient(trust_env=False) if metrics and len(clients) > 1 else None
        self._random = random.Random()
        self._refresh_s = refresh_s
        self._task: asyncio.Task[None] | None = None
        self._since: dict[str, int] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed = -math.inf
        self._readiness: tuple[float, Readiness] | None = None
        self._probing = asyncio.Lock()
        self._endings: dict[tuple[str, str, str], tuple[float, bool]] = {}

    async def start(self) -> None:
        """Asks the servers once, then keeps asking in the background."""
        await self.refresh()
        self._task = asyncio.create_task(self._keep_fresh())

    async def aclose(self) -> None:
        """Ends what runs and closes the connections."""
        for task in (self._task, self._refreshing):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await asyncio.gather(*(server.client.aclose() for server in self.servers))
        if self._http is not None:
            await self._http.aclose()

    @property
    def models(self) -> dict[str, int]:
        """The models that are ready somewhere, and when each was first seen (Unix time)."""
        names = {name for server in self.servers for name, info in server.models.items() if info.state == _READY}
        return {name: self._since[name] for name in sorted(names)}

    def version(self, model: str) -> str:
        """The version that answers, as the servers call it; of servers that differ, all of them."""
        infos = [server.models[model] for server in self.servers if model in server.models]
        return ",".join(sorted({info.version for info in infos if info.state == _READY}))

    @property
    def is_live(self) -> bool:
        """Whether one of the servers answers."""
        return any(not server.error for server in self.servers)

    def in_flight(self) -> int:
        """Requests that run now."""
        return sum(server.in_flight for server in self.servers)

    async def require(self, model: str) -> None:
        """Raises ApiError for a model that cannot be asked, having looked again: 503 for one that is being loaded or
        whose server does not answer, 404 for one that no server has."""
        if self._candidates(model):
            return
        await self.refresh(min(_LOOK_AGAIN_S, self._refresh_s))
        if self._candidates(model):
            return
        if any(_may_come(server, model) for server in self.servers):
            raise model_unavailable(model)
        raise model_not_found(model)

    async def readiness(self) -> Readiness:
        """Asks each model's engine for one token: Triton calls a model ready whose engine is dead."""
        async with self._probing:  # whoever comes meanwhile gets the same answer
            if self._readiness is None or time.monotonic() - self._readiness[0] > _PROBE_LIFETIME_S:
                found = await self._probe()
                self._readiness = (time.monotonic(), found)
            return self._readiness[1]

    async def answer(
        self, ask: Ask, into: Answer, share: Share = _EVERYBODY, cost: Callable[[], int] = lambda: 1
    ) -> AsyncGenerator[Delta, None]:
        """The pieces of an answer; the whole is in `into.result` at the end. Raises FlashserveError.

        Another server is tried while nothing has come, and a full engine is waited for. Closing the generator ends the
        request in the engine.

        Args:
            share: whose turn it is when several wait.
            cost: tells the tokens that it will probably be charged; asked only when it has to wait.
        """
        hashes = _beginnings_of(ask) if len(self.servers) > 1 else []
        async with self.lines.turn(ask.model, share, cost, ask.priority) as turn:
            while True:
                candidates = self._route(ask.model, hashes)
                refusals: list[FlashserveError] = []
                for index in candidates:
                    server = self.servers[index]
                    self._beginnings.add(hashes, index)
                    server.in_flight += 1
                    try:
                        async with contextlib.aclosing(_pieces(server.client, ask, into)) as pieces:
                            async for delta in pieces:
                                into.began = True
                                yield delta
                        return
                    except (ConnectionFailed, Unavailable) as error:
                        if into.began:
                            raise
                        refusals.append(error)
                    finally:
                        server.in_flight -= 1
                if not refusals:
                    raise Unavailable("no server can be reached", retry_after_ms=1000)
                full = [error for error in refusals if isinstance(error, Unavailable) and error.is_full]
                if not full:
                    raise refusals[-1]
                await turn.again(full[-1])

    async def tokenize(self, model: str, prompt: Any, template: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a text, or of messages with what else their template takes. Raises FlashserveError."""
        return await self._any_client(model).tokenize(prompt, model=model, **(template or {}))

    async def detokenize(self, model: str, token_ids: list[int]) -> str:
        """The text of token ids. Raises FlashserveError."""
        return await self._any_client(model).detokenize(token_ids, model=model)

    async def prompt_ends_with(self, tag: str, model: str, template: Mapping[str, Any]) -> bool:
        """Whether the model's chat template, with these fields, ends a prompt with a tag. Asked once a minute."""
        fields = hashlib.sha256(json.dumps(template, sort_keys=True, default=str).encode()).hexdigest()
        key = (tag, model, fields)
        known = self._endings.get(key)
        if known is not None and time.monotonic() - known[0] < _ENDING_LIFETIME_S:
            return known[1]
        candidates = self._candidates(model)
        if not candidates:
            return False
        try:
            rendering = candidates[0].client.render(_PROBE_MESSAGES, model=model, **template)
            prompt = await asyncio.wait_for(rendering, _RENDER_TIMEOUT_S)
        except (FlashserveError, asyncio.TimeoutError):
            return False  # no template, or fields that it refuses: the request itself will be told
        if len(self._endings) >= _KNOWN_ENDINGS:
            self._endings.clear()
        self._endings[key] = (time.monotonic(), prompt.rstrip().endswith(tag))
        return self._endings[key][1]

    async def refresh(self, unless_within_s: float = 0.0) -> None:
        """Asks every server for its models, unless that was done within the last seconds; who comes while it is done
        waits for the same answers, so that older ones never replace newer."""
        if self._refreshing is None or self._refreshing.done():
            if time.monotonic() - self._refreshed < unless_within_s:
                return
            self._refreshing = asyncio.create_task(self._ask_all())
        await asyncio.shield(self._refreshing)

    async def _ask_all(self) -> None:
        await asyncio.gather(*(self._ask(server) for server in self.servers))
        self._refreshed = time.monotonic()

    def _route(self, model: str, hashes: Sequence[int]) -> list[int]:
        """The servers that may answer, by number, in the order in which they are to be tried."""
        having = [index for index, server in enumerate(self.servers) if not server.error and self._has(server, model)]
        if len(having) < 2:
            return having
        well = [index for index in having if self.servers[index].gauges_of(model).is_healthy]
        candidates = []
        for index in well or having:  # gauges are a second old: an engine itself says whether it is there
            server = self.servers[index]
            load, kv_usage = server.in_flight + server.others, server.gauges_of(model).kv_usage
            candidates.append(Candidate(index, load, kv_usage))
        return order(candidates, self._beginnings.lengths(hashes), self._random)

    def _any_client(self, model: str) -> AsyncClient:
        candidates = self._candidates(model)
        if not candidates:
            raise Unavailable("no server can be reached", retry_after_ms=1000)
        return candidates[0].client

    def _candidates(self, model: str) -> list[Server]:
        """Servers with the model, the least loaded first; of equals any."""
        having = [server for server in self.servers if not server.error and self._has(server, model)]
        random.shuffle(having)
        return sorted(having, key=lambda server: server.in_flight)

    @staticmethod
    def _has(server: Server, model: str) -> bool:
        info = server.models.get(model)
        return info is not None and info.state == _READY

    async def _ask(self, server: Server) -> None:
        try:
            models = await asyncio.wait_for(server.client.models(), _INDEX_TIMEOUT_S)
        except Exception as error:  # of whatever kind: the next round asks again
            is_new = server.error in ("", _NOT_ASKED)  # told once, not every second
            is_expected = isinstance(error, (FlashserveError, asyncio.TimeoutError))
            if is_new:  # whatever it had computed is most likely gone
                self._beginnings.forget(self.servers.index(server))
            server.error = str(error) or f"no answer within {_INDEX_TIMEOUT_S:g} s"
            if is_new:
                log.warning("%s: %s", server.client.url, server.error, exc_info=None if is_expected else error)
            return
        if server.error:
            log.info("%s: answers", server.client.url)
        for info in models:
            self._since.setdefault(info.name, int(time.time()))
        server.models = {info.name: info for info in sorted(models, key=_use)}
        server.error = ""
        if self._http is not None and server.metrics:
            server.gauges = await read_gauges(self._http, server.metrics)
            requests = sum(gauges.requests for gauges in server.gauges.values())
            server.others = max(0, requests - server.in_flight)

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.refresh()

    async def _probe(self) -> Readiness:
        models = list(self.models)
        if not self.is_live or not models:
            return Readiness(0, {"models": "none is ready" if self.is_live else "no server can be reached"})
        found = dict(zip(models, await asyncio.gather(*map(self._probe_model, models)), strict=True))
        answering = sum(is_ready for is_ready, _ in found.values())
        return Readiness(answering, {name: detail for name, (_, detail) in found.items()})

    async def _probe_model(self, model: str) -> tuple[bool, str]:
        """Whether its engine answers, and what is to be said of it."""
        candidates = self._candidates(model)
        if candidates:
            health = await candidates[0].client.health(model=model, timeout_s=_PROBE_TIMEOUT_S)
            if health.server_live:
                return health.engine_ready, health.detail
        # Why a server cannot be reached holds its address, which is the log's and not everybody's.
        return False, "its server cannot be reached"


def _beginnings_of(ask: Ask) -> list[int]:
    """By what servers are told apart that have computed some of it. Tools stand before the messages in a template."""
    seed = [ask.params.get(name) for name in ("cache_salt", "tools", "chat_template_kwargs")]
    return beginnings([ask.model, *seed], ask.prompt)


def _use(info: ModelInfo) -> int:
    """Of a model's versions the last in this order counts."""
    return {_READY: 2, _LOADING: 1}.get(info.state, 0)


def _may_come(server: Server, model: str) -> bool:
    """Whether a server that does not serve a model now may do so soon."""
    info = server.models.get(model)
    if server.error:
        return info is not None or not server.models  # one that was never seen may have any
    return info is not None and info.state == _LOADING


@dataclass
class Answer:
    """What is known of an answer beside its pieces."""

    began: bool = False
    result: GenerateResult | None = None
    """The whole, once the last piece has come."""
    embedding: EmbedResult | None = None
    """Likewise, of an ask that embeds."""
    error: FlashserveError | None = None
    """Why there will be none."""


async def _pieces(client: AsyncClient, ask: Ask, into: Answer) -> AsyncGenerator[Delta, None]:
    options: dict[str, Any] = {"model": ask.model, "priority": ask.priority, "request_id": ask.request_id, **ask.params}
    if ask.embeds:
        into.embedding = await client.embed(ask.prompt, **options)  # type: ignore[arg-type]  # never messages
        yield Delta("", 0, "stop")
        return
    if not ask.stream:
        result = into.result = await client.generate(ask.prompt, **options)
        yield Delta(result.text, result.completion_tokens, result.finish_reason)
        return
    async with client.stream(ask.prompt, **options) as stream:
        async for delta in stream:
            if delta.finish_reason is not None:
                into.result = stream.result
            yield delta
