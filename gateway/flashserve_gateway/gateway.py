"""What the routes share: settings, servers, keys, metrics; and one request on its way."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from flashserve_client import Delta, EmbedResult, FlashserveError, GenerateResult

from .answers import HEADER, AnswerCache, KeptAnswer, may_be_kept
from .engine_metrics import EngineMetrics
from .errors import ApiError, internal_error, of_engine
from .incoming import Bodies, read_object
from .keys import Admission, Caller, Keyring
from .manager import ModelManager
from .metrics import Metrics
from .parameters import INT32_MAX
from .patience import Patience
from .pool import Answer, Ask, Pool
from .recent import RecentRequests
from .settings import Settings
from .store.interface import Asked, Store, StoreAway

log = logging.getLogger("flashserve_gateway")

T = TypeVar("T")

_CHARACTERS_PER_TOKEN = 4  # of English; what the engine counts is charged in its place when an answer ends
_RESERVED_WITHOUT_LIMIT = 1024
"""Of an answer that may fill the context: that much would leave no room for a second one."""


@dataclass(frozen=True)
class Gateway:
    """One gateway."""

    settings: Settings
    pool: Pool
    keyring: Keyring
    metrics: Metrics
    engine_metrics: EngineMetrics
    bodies: Bodies
    manager: ModelManager
    recent: RecentRequests
    store: Store
    answers: AnswerCache | None
    """None: no answer is kept."""

    def caller(self, request: Request) -> Caller:
        """Who asks. Raises ApiError."""
        return self.keyring.caller(request.headers)

    def require_admin(self, request: Request) -> None:
        """Lets those through who may load models. Raises ApiError."""
        if not self.caller(request).key.admin and not self.settings.is_private:
            words = 'this needs a key whose entry in the keys file has "admin": true'
            if self.keyring.is_open:
                words = "this gateway serves other machines without keys: only with --keys FILE it loads models"
            raise ApiError(403, words, code="admin_required")

    async def begin(self, request: Request) -> Call:
        """Reads a request with a JSON body. Raises ApiError and ClientGone."""
        caller = self.caller(request)
        body = await read_object(request, self.settings.limits, self.bodies)
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            self.metrics.retries.inc()
        return Call(self, str(request.state.request_id), caller, body)


@dataclass
class Call:
    """A request whose body was read, and the asks to engines that it becomes."""

    gateway: Gateway
    request_id: str
    """As the client sees it in x-request-id, and the engine in its log."""
    caller: Caller
    body: dict[str, Any]
    in_background: bool = False
    """Of a batch: it takes no place of its key's requests in flight, and leaves it half of its tokens."""
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)
    headers: dict[str, str] = field(default_factory=dict)
    """Of the answer. They are known when the request was admitted."""
    _admission: Admission = field(init=False)
    _kept: dict[str, KeptAnswer] = field(default_factory=dict)
    """Answers that were found, by the ids of their asks."""
    _keeps_version: str | None = None
    """Of the model whose answers are to be kept; None: they are not."""

    @contextlib.asynccontextmanager
    async def admitted(self, model: str, asks: Sequence[Ask] = (), at_once: int | None = None) -> AsyncIterator[None]:
        """Holds the places of a request that becomes these asks (none: only its tokenizer is asked), before anything
        is asked of a server. Raises ApiError, also for a model that cannot be asked. at_once: how many of them run at
        the same time; None: all."""
        if await self._is_kept(model, asks):
            yield
            return
        tokens = sum(map(_reserve, asks)) if self.caller.is_metered else 0
        places = 0 if self.in_background else max(1, len(asks) if at_once is None else at_once)
        asked = Asked(self.request_id, model, places, tokens, self.in_background)
        async with self.gateway.store.quotas.admit(self.caller, asked) as self._admission:
            await self.gateway.pool.require(model)
            yield

    async def _is_kept(self, model: str, asks: Sequence[Ask]) -> bool:
        """Whether each of the asks was answered before. Such a request takes no place and no tokens of its key. Raises
        ApiError."""
        cache = self.gateway.answers
        if cache is None or not asks or not all(map(may_be_kept, asks)):
            return False
        self.caller.check(model, places=0)
        await self.gateway.pool.require(model)
        version = self.gateway.pool.version(model)
        try:
            found = await cache.find(self.caller.key.name, asks, version)
        except StoreAway:
            return False
        if found is None:
            self.headers[HEADER], self._keeps_version = "miss", version
            return False
        self.headers[HEADER] = "hit"
        self._kept = {ask.request_id: answer for ask, answer in zip(asks, found, strict=True)}
        return True

    def pieces(self, ask: Ask, answer: Answer) -> AsyncGenerator[Delta, None]:
        """An answer's pieces, of a request that was admitted. Raises ApiError; closing it ends the request in the
        engine."""
        if (kept := self._kept.get(ask.request_id)) is not None:
            return _replayed(kept, ask, answer)
        asked = self._asked(ask, answer)
        return asked if self._keeps_version is None else self._keeping(asked, ask, answer, self._keeps_version)

    async def _keeping(
        self, asked: AsyncGenerator[Delta, None], ask: Ask, answer: Answer, version: str
    ) -> AsyncGenerator[Delta, None]:
        """The same pieces; at their end the answer is kept."""
        seen: list[Delta] = []
        async with contextlib.aclosing(asked) as deltas:
            async for delta in deltas:
                seen.append(delta)
                yield delta
        if self.gateway.answers is not None and answer.result is not None:
            await self.gateway.answers.keep(self.caller.key.name, ask, version, KeptAnswer(seen, answer.result))

    async def _asked(self, ask: Ask, answer: Answer) -> AsyncGenerator[Delta, None]:
        """Pieces from an engine, counted and charged."""
        metrics, limits = self.gateway.metrics, self.gateway.settings.limits
        patience = Patience(limits.first_token_timeout_s if ask.stream else limits.whole_timeout_s)
        deltas = self.gateway.pool.answer(ask, answer, self.caller.share, functools.partial(_reserve, ask))
        bar = self.gateway.recent.begin(ask.model)
        try:
            while True:
                with patience:
                    if (delta := await anext(deltas, None)) is None:
                        return
                is_news = delta.progress is None or delta.completion_tokens
                if ask.stream and bar.first is None and is_news:
                    bar.first = time.monotonic()
                    patience.change(limits.stall_timeout_s)
                    metrics.first_token.labels(ask.model).observe(time.perf_counter() - self.started)
                bar.tokens += delta.completion_tokens
                self._admission.use(delta.completion_tokens)
                yield delta
        except FlashserveError as error:
            answer.error = error
            raise of_engine(error, ask.model, ask.request_id) from None
        finally:
            patience.end()
            await deltas.aclose()
            bar.end(None if answer.result is None else answer.result.timings)
            self._settle(ask, answer, bar.tokens)

    def _settle(self, ask: Ask, answer: Answer, generated: int) -> None:
        """Counts what was read, and charges it. Leaving early is not free: an answer that was cut off costs what was
        probably read, or, if nothing is known of it, what was reserved. One that the engine refused costs nothing."""
        whole = answer.result or answer.embedding
        read = whole.prompt_tokens if whole is not None else 0
        if read or generated:
            self.gateway.metrics.count_tokens(ask.model, read, generated)
        if whole is not None:
            self._admission.use(read)
        elif answer.began or answer.error is None:
            if ask.stream:
                self._admission.use(_prompt_tokens(ask))
            else:
                self._admission.use_up()

    async def tokenized(self, work: Awaitable[T], model: str) -> T:
        """What a tokenizer answers. Raises ApiError."""
        patience = Patience(self.gateway.settings.limits.first_token_timeout_s)
        try:
            with patience:
                return await work
        except FlashserveError as error:
            raise of_engine(error, model, self.request_id) from None
        finally:
            patience.end()

    async def whole(self, ask: Ask) -> GenerateResult:
        """An answer at once. Raises ApiError."""
        answer = Answer()
        async for _ in self.pieces(ask, answer):
            pass
        assert answer.result is not None  # or `pieces` had raised
        return answer.result

    async def embedded(self, ask: Ask) -> EmbedResult:
        """An embedding. Raises ApiError."""
        answer = Answer()
        async for _ in self.pieces(ask, answer):
            pass
        assert answer.embedding is not None  # or `pieces` had raised
        return answer.embedding

    def explain(self, error: BaseException) -> ApiError:
        """What a client is told of an exception, which the log gets as a whole if it is a bug."""
        if isinstance(error, ApiError):
            return error
        log.error("request %s failed", self.request_id, exc_info=error)
        return internal_error(self.request_id)


async def _replayed(kept: KeptAnswer, ask: Ask, answer: Answer) -> AsyncGenerator[Delta, None]:
    answer.result = kept.result
    for delta in kept.pieces_for(ask):
        yield delta


def _prompt_tokens(ask: Ask) -> int:
    """About how many; the engine counts them, but only at the end."""
    if isinstance(ask.prompt, str):
        return 1 + len(ask.prompt) // _CHARACTERS_PER_TOKEN
    if all(isinstance(item, int) for item in ask.prompt):
        return len(ask.prompt)
    return 1 + len(str(ask.prompt)) // _CHARACTERS_PER_TOKEN


def _reserve(ask: Ask) -> int:
    """The tokens that a request will probably use."""
    if ask.embeds:
        return _prompt_tokens(ask)
    limit = ask.params.get("max_tokens", INT32_MAX)
    return _prompt_tokens(ask) + (limit if limit != INT32_MAX else _RESERVED_WITHOUT_LIMIT)


def usage_of(results: Sequence[GenerateResult], samples: int = 1) -> dict[str, Any]:
    """OpenAI's counts of a request's answers, of which `samples` that follow each other have one prompt."""
    prompts = results[::samples]
    prompt_tokens = sum(result.prompt_tokens for result in prompts)
    completion_tokens = sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(result.timings.cached_tokens or 0 for result in prompts)},
    }
