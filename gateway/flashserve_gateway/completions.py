"""Completions: one answer for each prompt of a request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from openai.types import Completion

from flashserve_client import GenerateResult

from . import parameters, structure
from .abilities import refuse_missing
from .chat import finish_reason
from .errors import invalid
from .gateway import Call, usage_of
from .merging import gathered, merged
from .pool import Answer, Ask
from .sse import DONE, CompletionChunks

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

Prompt = str | list[int]


@dataclass(frozen=True)
class CompletionRequest:
    """A checked request."""

    asks: tuple[Ask, ...]
    """`samples` of the first prompt, then of the next."""
    samples: int
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
    structure.add_form(params, structure.response_format(body), "response_format")
    model = parameters.read_model(body)
    priority = call.caller.priority(parameters.read_priority(body))
    limits = call.gateway.settings.limits
    prompts = read_prompts(body.get("prompt"), limits.prompts)
    samples = parameters.read_samples(body, limits.samples)
    asks: list[Ask] = []
    for index, prompt in enumerate(prompts):
        request_id = call.request_id if len(prompts) == 1 else f"{call.request_id}-{index}"
        asks += Ask(model, prompt, params, request_id, priority, stream).samples(samples)
    return CompletionRequest(
        asks=tuple(asks),
        samples=samples,
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
    ids = [int(token) for token in ask.prompt]  # type: ignore[arg-type]
    return await call.tokenized(call.gateway.pool.detokenize(ask.model, ids), ask.model)


async def complete(call: Call, request: CompletionRequest) -> Completion:
    """All answers at once. Raises ApiError."""

    async def one(index: int) -> tuple[str, GenerateResult]:
        return await _echo(call, request, index), await call.whole(request.asks[index])

    async with call.admitted(request.asks[0].model, request.asks):
        answers = await gathered([one(index) for index in range(len(request.asks))])
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
            "usage": usage_of([result for _, result in answers], request.samples),
        }
    )


async def stream_completion(call: Call, request: CompletionRequest) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer: pieces of all prompts as they come. Raises ApiError."""
    chunks = CompletionChunks(_answer_id(call), request.asks[0].model, call.created, request.usage_wanted)
    answers = [Answer() for _ in request.asks]
    async with call.admitted(request.asks[0].model, request.asks):
        streams = [_stream_one(call, request, chunks, index, answer) for index, answer in enumerate(answers)]
        async with contextlib.aclosing(merged(streams)) as events:
            async for event in events:
                yield event
    if request.usage_wanted:
        results = [answer.result for answer in answers if answer.result is not None]
        yield chunks.usage(usage_of(results, request.samples))
    yield DONE


async def _stream_one(
    call: Call, request: CompletionRequest, chunks: CompletionChunks, index: int, answer: Answer
) -> AsyncGenerator[bytes, None]:
    before = await _echo(call, request, index)
    async with contextlib.aclosing(call.pieces(request.asks[index], answer)) as pieces:
        async for delta in pieces:
            text, before = before + delta.text, ""  # with the first piece: what is refused has its own status
            if delta.finish_reason is not None:
                yield chunks.text(index, text, finish_reason(delta.finish_reason, False))
            elif text:
                yield chunks.text(index, text)


def _answer_id(call: Call) -> str:
    return f"cmpl-{call.request_id}"
