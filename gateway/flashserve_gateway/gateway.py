"""What the routes share: settings, servers, keys, metrics; and one request on its way."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from flashserve_client import Delta, FlashserveError, GenerateResult

from .engine_metrics import EngineMetrics
from .errors import ApiError, internal_error, of_engine
from .incoming import read_object
from .keys import Caller, Keyring
from .metrics import Metrics
from .pool import Answer, Ask, Pool
from .settings import Settings

log = logging.getLogger("flashserve_gateway")


@dataclass(frozen=True)
class Gateway:
    """One gateway."""

    settings: Settings
    pool: Pool
    keyring: Keyring
    metrics: Metrics
    engine_metrics: EngineMetrics

    def caller(self, request: Request) -> Caller:
        """Who asks. Raises ApiError."""
        return self.keyring.caller(request.headers)

    async def begin(self, request: Request) -> Call:
        """Reads a request with a JSON body. Raises ApiError and ClientGone."""
        caller = self.caller(request)
        body = await read_object(request, self.settings.limits)
        if request.headers.get("x-stainless-retry-count", "0") != "0":
            self.metrics.retries.inc()
        return Call(self, request, caller, body)


@dataclass
class Call:
    """A request whose body was read, and the asks to engines that it becomes."""

    gateway: Gateway
    request: Request
    caller: Caller
    body: dict[str, Any]
    created: int = field(default_factory=lambda: int(time.time()))
    started: float = field(default_factory=time.perf_counter)

    @property
    def request_id(self) -> str:
        """As the client sees it in x-request-id, and the engine in its log."""
        return str(self.request.state.request_id)

    async def pieces(self, ask: Ask, answer: Answer) -> AsyncGenerator[Delta, None]:
        """An answer's pieces, counted and charged. Raises ApiError; closing it ends the request in the engine."""
        metrics = self.gateway.metrics
        with self.caller.admit(ask.model):
            await self.gateway.pool.require(ask.model)
            deltas = self.gateway.pool.answer(ask, answer)
            has_begun, generated = False, 0
            try:
                async for delta in deltas:
                    if ask.stream and not has_begun:
                        has_begun = True
                        metrics.first_token.labels(ask.model).observe(time.perf_counter() - self.started)
                    generated += delta.completion_tokens
                    yield delta
            except FlashserveError as error:
                raise of_engine(error, ask.model, ask.request_id) from None
            finally:
                await deltas.aclose()
                read = answer.result.prompt_tokens if answer.result is not None else 0
                if read or generated:
                    metrics.count_tokens(ask.model, read, generated)
                    self.caller.charge(read + generated)

    async def whole(self, ask: Ask) -> GenerateResult:
        """An answer at once. Raises ApiError."""
        answer = Answer()
        async for _ in self.pieces(ask, answer):
            pass
        assert answer.result is not None  # or `pieces` had raised
        return answer.result

    def explain(self, error: BaseException) -> ApiError:
        """What a client is told of an exception, which the log gets as a whole if it is a bug."""
        if isinstance(error, ApiError):
            return error
        log.error("request %s failed", self.request_id, exc_info=error)
        return internal_error(self.request_id)


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
