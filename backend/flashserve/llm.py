"""The offline API: the same engine in the caller's own process, without Triton.

from flashserve import LLM

with LLM("HuggingFaceTB/SmolLM2-135M") as llm:
    for result in llm.generate(["def fibonacci(n):"], {"temperature": 0, "max_tokens": 64}):
        print(result.text)
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec

from flashserve.config import EngineConfig
from flashserve.engine.loading import load_engine
from flashserve.engine.process import HELD_POLL_S, engine_limits
from flashserve.errors import BY_CODE, InternalError, InvalidArgument
from flashserve.pooling_params import EMBEDDING_PARAMS, parse_pooling_params
from flashserve.protocol import Abort, FinishReason, GenerateRequest, PoolingParams, RequestTimings, SamplingParams
from flashserve.sampling_params import parse_sampling_params
from flashserve.text.completion import Completion
from flashserve.text.embedding import EmbeddingAnswer
from flashserve.text.generation_defaults import read_generation_defaults
from flashserve.text.logprobs import TokenScore
from flashserve.text.prompt import check_prompt, stop_at_special_tokens
from flashserve.text.tokenizer import Tokenizer
from flashserve.text.words import with_word_ids

Prompt = str | Sequence[int]
Params = SamplingParams | Mapping[str, Any] | None


@dataclass(frozen=True)
class Generated:
    """One finished sample of a prompt."""

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    timings: RequestTimings | None
    logprobs: list[TokenScore] | None = None
    """One for each token, where the parameter of that name is set."""
    cumulative_logprob: float | None = None
    """Of all tokens together, where ``logprobs`` is set."""
    prompt_logprobs: list[TokenScore | None] | None = None
    """One for each token of the prompt, None for its first, where the parameter of that name is set; with the first of
    ``n`` samples."""


@dataclass(frozen=True)
class Embedded:
    """One prompt's embedding."""

    prompt_token_ids: list[int]
    embedding: list[float]
    timings: RequestTimings | None


class LLM:
    """Loads a model and generates with it. Not thread-safe: one caller at a time."""

    def __init__(self, model: str | Path, **settings: Any) -> None:
        """``settings`` are those of ``model.json`` (EngineConfig). Raises ConfigError, naming the setting."""
        config = EngineConfig.from_mapping({"model": str(model), **settings}, Path.cwd())
        self.resolved, self._core = load_engine(config)
        card = self.resolved.model.card
        self.tokenizer = Tokenizer.from_card(card)
        self.limits = engine_limits(self.resolved)
        own = card.generation_config if config.generation_config == "auto" else {}
        self._defaults = read_generation_defaults(own, config.override_generation_config).parameters
        self._ids = itertools.count(1)

    def generate(self, prompts: Prompt | Sequence[Prompt], params: Params | Sequence[Params] = None) -> list[Generated]:
        """Generate for all prompts at once; results in the prompts' order, ``n`` for each one after the other.

        A prompt is a text or token ids. ``params`` is one for all or one each: SamplingParams, or a mapping with
        the names of the server's sampling_parameters; what it leaves open comes from the model's
        generation_config.json, as in the server; without max_tokens in either, a text may fill the context (the server
        gives it 16). Raises InvalidArgument: before anything runs, but for an ``n`` that could never fit.
        """
        prompt_list = _as_list(prompts)
        one = params is None or isinstance(params, (SamplingParams, Mapping))
        each = [cast(Params, params)] * len(prompt_list) if one else list(cast(Sequence[Params], params))
        if len(each) != len(prompt_list):
            raise InvalidArgument(f"{len(prompt_list)} prompts but {len(each)} params: give one, or one each")
        requests = [self._request(prompt, given) for prompt, given in zip(prompt_list, each, strict=True)]
        samples = [(request, index) for request in requests for index in range(request.params.n)]
        completions = {(request.request_id, index): Completion(self.tokenizer, request) for request, index in samples}
        self._run(requests, completions)
        return [_generated(request, completions[request.request_id, index]) for request, index in samples]

    def embed(
        self, prompts: Prompt | Sequence[Prompt], pooling_params: PoolingParams | Mapping[str, Any] | None = None
    ) -> list[Embedded]:
        """Embeddings of all prompts, in their order.

        ``pooling_params``: PoolingParams, or a mapping with the names of the server's pooling_params: ``pooling``
        (last, mean, cls), ``dimensions``, ``normalize``. Raises InvalidArgument before anything runs.
        """
        given = pooling_params
        values = msgspec.structs.asdict(given) if isinstance(given, PoolingParams) else dict(given or {})
        pooling = parse_pooling_params(values, self.limits.hidden_size)
        requests = []
        for prompt in _as_list(prompts):
            token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
            token_ids = check_prompt("prompt", token_ids, EMBEDDING_PARAMS, self.limits, room=0)
            requests.append(
                GenerateRequest(next(self._ids), token_ids, EMBEDDING_PARAMS, time.monotonic(), pooling=pooling)
            )
        embeddings = {(request.request_id, 0): EmbeddingAnswer(self.tokenizer, request) for request in requests}
        self._run(requests, embeddings)
        found = zip(requests, embeddings.values(), strict=True)
        return [Embedded(request.prompt_token_ids, one.values, one.timings) for request, one in found]

    def stats(self) -> Any:
        """The engine's counters (protocol.Stats)."""
        return self._core.scheduler.stats()

    def close(self) -> None:
        """Free the model's memory. Idempotent."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(self, prompt: Prompt, given: Params) -> GenerateRequest:
        params = stop_at_special_tokens(parse_sampling_params(_as_mapping(given), self._defaults), self.tokenizer)
        params = with_word_ids(params, self.tokenizer, self.limits)
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        token_ids = check_prompt("prompt", token_ids, params, self.limits)
        return GenerateRequest(next(self._ids), token_ids, params, arrival=time.monotonic())

    def _run(self, requests: list[GenerateRequest], completions: Mapping[tuple[int, int], Completion]) -> None:
        unfinished = set(completions)
        pending = deque(requests)
        try:
            while unfinished:
                # The queue is bounded as in the server; offline there is nobody to refuse.
                while pending and self._core.scheduler.has_room(len(pending[0].prompt_token_ids)):
                    self._core.handle(pending.popleft())
                if self._core.is_held:  # by grammars that are being compiled
                    time.sleep(HELD_POLL_S)
                for output in self._core.step().outputs:
                    sample = output.request_id, output.index
                    completion = completions.get(sample)
                    if completion is None:
                        continue  # the echo of an abort
                    if completion.take(output):
                        self._core.handle(Abort([], [sample]))
                    if completion.finish_reason is not None:
                        unfinished.discard(sample)
                    if completion.error is not None:
                        raise BY_CODE.get(completion.error.code, InternalError)(completion.error.message)
        finally:
            if unfinished:  # interrupted or failed: leave an empty engine behind
                self._core.handle(Abort([request_id for request_id, _ in unfinished]))
                self._core.step()


def _generated(request: GenerateRequest, completion: Completion) -> Generated:
    assert completion.finish_reason is not None
    delta, scored = completion.delta(), request.params.logprobs is not None
    return Generated(
        prompt_token_ids=request.prompt_token_ids,
        text=delta.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        timings=completion.timings,
        logprobs=list(delta.scores) if scored else None,
        cumulative_logprob=delta.cumulative_logprob if scored else None,
        prompt_logprobs=completion.take_prompt_scores(),
    )


def _as_mapping(params: Params) -> dict[str, Any]:
    """What a caller set, by name: SamplingParams built by hand are checked like everything else."""
    if params is None:
        return {}
    if isinstance(params, Mapping):
        return dict(params)
    neutral = msgspec.structs.asdict(SamplingParams())
    given = {name: value for name, value in msgspec.structs.asdict(params).items() if value != neutral[name]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
