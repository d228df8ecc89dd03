"""Completions: one answer for each prompt of a request."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from openai.types import Completion

from flashserve_client import Delta, FlashserveError, GenerateResult

from . import parameters
from .abilities import refuse_missing
from .chat import finish_reason
from .errors import invalid, of_engine
from .gateway import Call, usage_of
from .pool import Answer, Ask
from .sse import DONE, CompletionChunks

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
# A stream's reader that lags behind holds its engines back, rather than let their text pile up here.
_QUEUED_PIECES = 32

Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request: the asks are its prompts, in order."""

    asks: tuple[Ask, ...]
    usage_wanted: bool
    echo: bool


def read_completion(call: Call) -> CompletionRequest:
    """Checks a body. Raises ApiError."""
    body = call.body
    parameters.check_names(body, parameters.COMPLETION)
    refuse_missing(body)
    stream = parameters.read(body, "stream", bool, False)
    params = parameters.engine_params(body)
    params["max_tokens"] = parameters.read_count(body, "max_tokens") or _DEFAULT_MAX_TOKENS
    model = parameters.read_model(body)
    priority = call.caller.priority(parameters.read_priority(body))
    prompts = read_prompts(body.get("prompt"), call.gateway.settings.limits.prompts)
    asks = []
    for index, prompt in enumerate(prompts):
        request_id = call.request_id if len(prompts) == 1 else f"{call.request_id}-{index}"
        asks.append(Ask(model, prompt, params, request_id, priority, stream))
    return CompletionRequest(
        asks=tuple(asks),
        usage_wanted=parameters.read_usage_wanted(body, stream),
        echo=parameters.read(body, "echo", bool, False),
    )


def read_prompts(value: object, limit: int) -> list[Prompt]:
    """A string, token ids, or a list of either. Raises ApiError."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise invalid("prompt", "prompt must be a string, a list of token ids, or a non-empty list of these")
    if len(prompts) > limit:
        raise invalid("prompt", f"prompt: at most {limit} in one request, not {len(prompts)}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not _is_ids(prompt):
            raise invalid("prompt", f"prompt[{index}] must be a string or a non-empty list of token ids")
    return prompts


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


async def _echo(call: Call, request: CompletionRequest, index: int) -> str:
    """The prompt's text, if the answer is to begin with it."""
    ask = request.asks[index]
    if not request.echo:
        return ""
    if isinstance(ask.prompt, str):
        return ask.prompt
    try:
        return await call.gateway.pool.detokenize(ask.model, [int(token) for token in ask.prompt])  # type: ignore[arg-type]
    except FlashserveError as error:
        raise of_engine(error, ask.model, ask.request_id) from None


async def complete(call: Call, request: CompletionRequest) -> Completion:
    """All answers at once; the first that fails ends the others. Raises ApiError."""

    async def one(index: int) -> tuple[str, GenerateResult]:
        return await _echo(call, request, index), await call.whole(request.asks[index])

    tasks = [asyncio.create_task(one(index)) for index in range(len(request.asks))]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        await _end(tasks)
    choices = [
        {
            "index": index,
            "text": before + result.text,
            "finish_reason": finish_reason(result.finish_reason or "stop", False),
            "logprobs": None,
        }
        for index, (before, result) in enumerate(answers)
    ]
    return Completion.model_validate(
        {
            "id": _answer_id(call),
            "object": "text_completion",
            "created": call.created,
            "model": request.asks[0].model,
            "choices": choices,
            "usage": _usage([result for _, result in answers]),
        }
    )


async def stream_completion(call: Call, request: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer: pieces of all prompts as they come. Raises ApiError."""
    chunks = CompletionChunks(_answer_id(call), request.asks[0].model, call.created, request.usage_wanted)
    answers = [Answer() for _ in request.asks]
    async with contextlib.aclosing(_merged(call, request, answers)) as merged:
        async for index, delta in merged:
            if delta.finish_reason is not None:
                yield chunks.text(index, delta.text, finish_reason(delta.finish_reason, False))
            elif delta.text:
                yield chunks.text(index, delta.text)
    if request.usage_wanted:
        yield chunks.usage(_usage([answer.result for answer in answers if answer.result is not None]))
    yield DONE


async def _merged(
    call: Call, request: CompletionRequest, answers: list[Answer]
) -> AsyncGenerator[tuple[int, Delta], None]:
    """The pieces of all answers, each with its prompt's number."""
    queue: asyncio.Queue[tuple[int, Delta] | BaseException | None] = asyncio.Queue(_QUEUED_PIECES)

    async def read(index: int) -> None:
        try:
            if before := await _echo(call, request, index):
                await queue.put((index, Delta(before, 0, None)))
            async with contextlib.aclosing(call.pieces(request.asks[index], answers[index])) as pieces:
                async for delta in pieces:
                    await queue.put((index, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(read(index)) for index in range(len(request.asks))]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if item is None:
                running -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        await _end(tasks)


async def _end(tasks: list[asyncio.Task[None]] | list[asyncio.Task[tuple[str, GenerateResult]]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _usage(results: list[GenerateResult]) -> dict[str, object]:
    return usage_of(
        sum(result.prompt_tokens for result in results),
        sum(result.completion_tokens for result in results),
        sum(result.timings.cached_tokens or 0 for result in results),
    )


def _answer_id(call: Call) -> str:
    return f"cmpl-{call.request_id}"
