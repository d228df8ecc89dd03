"""Completions: one answer for each prompt of a request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Any

from openai.types import Completion
from openai.types.completion_choice import Logprobs

from flashserve_client import GenerateResult

from . import parameters, structure
from .abilities import refuse_missing
from .chat import finish_reason
from .errors import invalid
from .gateway import Call, usage_of
from .logprobs import completion_logprobs, echoed_logprobs, read_completion_count
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
    logprobs: int | None = None
    """Alternatives of each token; None: no log-probabilities."""
    scores_only: bool = False
    """The prompt is all that is wanted (`max_tokens: 0`): the engine's one token is left out."""


def read_completion(call: Call) -> CompletionRequest:
    """Checks a body. Raises ApiError."""
    body = call.body
    parameters.check_names(body, parameters.COMPLETION)
    refuse_missing(body)
    stream = parameters.read(body, "stream", bool, False)
    params = parameters.engine_params(body)
    echo, logprobs = parameters.read(body, "echo", bool, False), read_completion_count(body)
    scores_only = echo and not stream and parameters.read(body, "max_tokens", int, 1) == 0
    limit = 1 if scores_only else parameters.read_count(body, "max_tokens")
    params["max_tokens"] = limit or _DEFAULT_MAX_TOKENS
    if logprobs is not None:
        params["logprobs"] = logprobs
        if echo and stream:
            raise invalid("echo", "echo: a stream that repeats its prompt has no logprobs; leave one of the three out")
        if echo:
            params["prompt_logprobs"] = logprobs
    params.update(parameters.read_progress_wanted(body, stream))
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
        echo=echo,
        logprobs=logprobs,
        scores_only=scores_only,
    )


def read_prompts(value: object, limit: int) -> list[Prompt]:
    """A string, token ids, or a list of either. Raises ApiError."""
    prompts = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(prompts, list) or not prompts:
        raise invalid("prompt", "prompt must be a string, a list of token ids, or a non-empty list of these")
    if len(prompts) > limit:
        raise invalid("prompt", f"prompt: at most {limit} in one request, not {len(prompts)}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) and not is_ids(prompt):
            raise invalid("prompt", f"prompt[{index}] must be a string or a non-empty list of token ids")
    return prompts


def is_ids(value: object) -> bool:
    """Whether it is a list of at least one token id."""
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
        before, result = await _echo(call, request, index), await call.whole(request.asks[index])
        if request.scores_only:
            result = replace(result, text="", completion_tokens=0, finish_reason="length", logprobs=())
        return before, result

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
    completion = Completion.model_validate(
        {
            "id": _answer_id(call),
            "object": "text_completion",
            "created": call.created,
            "model": request.asks[0].model,
            "choices": choices,
            "usage": usage_of([result for _, result in answers], request.samples),
        }
    )
    if request.logprobs is not None:
        for choice, (before, result) in zip(completion.choices, answers, strict=True):
            # Not validated: the first token of a prompt has null in lists that OpenAI's types say are of numbers.
            choice.logprobs = Logprobs.model_construct(**_logprobs(before, result))
    return completion


def _logprobs(before: str, result: GenerateResult) -> dict[str, Any]:
    tokens = result.logprobs or ()
    if result.prompt_logprobs is None:
        return completion_logprobs(tokens, len(before))
    return echoed_logprobs(before, result.prompt_logprobs, tokens)


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
    before, offset = await _echo(call, request, index), 0
    async with contextlib.aclosing(call.pieces(request.asks[index], answer)) as pieces:
        async for delta in pieces:
            if delta.progress is not None:
                yield chunks.progress(index, delta.progress._asdict())
            text, before = before + delta.text, ""  # with the first piece: what is refused has its own status
            reason = None if delta.finish_reason is None else finish_reason(delta.finish_reason, False)
            logprobs = None
            if request.logprobs is not None and delta.logprobs:
                logprobs = completion_logprobs(delta.logprobs, offset)
                offset += sum(len(one.token.text) for one in delta.logprobs)
            if text or reason or logprobs:
                yield chunks.text(index, text, reason, logprobs)


def _answer_id(call: Call) -> str:
    return f"cmpl-{call.request_id}"
