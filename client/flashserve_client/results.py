"""What a request gives back."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import NamedTuple

from .logprobs import TokenLogprobs


class PromptProgress(NamedTuple):
    """How far the server is with a prompt: of its `total` tokens it found `cache` in the prefix cache, and has
    `processed` in all; `time_ms` since it began."""

    total: int
    cache: int
    processed: int
    time_ms: float

    @classmethod
    def from_json(cls, text: str) -> PromptProgress:
        """From the `prompt_progress` output. ValueError if it is none."""
        values = json.loads(text)
        try:
            return cls(*(values[name] for name in cls._fields))
        except (TypeError, KeyError) as error:
            raise ValueError(f"prompt_progress without {error}") from None


class Delta(NamedTuple):
    """One piece of a streamed answer.

    `text` may be empty although `completion_tokens` is not 0: a character can span tokens. `finish_reason` is None
    until the last piece of the sample that `index` names, 0 unless `n` were asked for. The server merges pieces for a
    slow reader, so `completion_tokens` may be above 1. `progress` comes before or with the first token, if asked for.
    """

    text: str
    completion_tokens: int
    finish_reason: str | None
    index: int = 0  # type: ignore[assignment]  # over tuple's method, which nobody asks of a piece
    progress: PromptProgress | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of these tokens, where the parameter `logprobs` is set."""


@dataclass(frozen=True)
class Timings:
    """The server's own figures of one request; None where the server did not report one. Times in milliseconds."""

    queue_ms: float | None = None
    prefill_ms: float | None = None
    ttft_ms: float | None = None
    decode_ms: float | None = None
    cached_tokens: int | None = None
    preemptions: int | None = None

    @classmethod
    def from_json(cls, text: str) -> Timings:
        """From the `request_metrics` output; fields of newer servers are left out. ValueError if it is no object."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("request_metrics is not a JSON object")
        return cls(**{name: values[name] for name in _TIMING_NAMES if name in values})


_TIMING_NAMES = tuple(field.name for field in fields(Timings))


@dataclass(frozen=True)
class Completion:
    """One of the samples of an answer; the attributes are those of `GenerateResult`."""

    index: int
    text: str
    completion_tokens: int
    finish_reason: str | None


@dataclass(frozen=True)
class GenerateResult:
    """A whole answer.

    Attributes:
        text: the generated text, without the prompt; of `n` samples the first one's.
        prompt_tokens, completion_tokens: the server's counts, of all samples; 0 if it reported none.
        finish_reason: "stop", "length", ...; None only in `FlashserveError.partial`. Of `n` samples the first one's.
        timings: the server's figures.
        ttft_s: seconds from sending to the first text or token, as seen here; None if none came.
        latency_s: seconds from sending to the last piece, as seen here. Retries count into both.
        request_id: the id under which the server logs this request.
        completions: all samples, as many as `n` asked for.
        logprobs: one entry for each token, where the parameter `logprobs` is set.
        cumulative_logprob: of all tokens together, where it is set.
        prompt_logprobs: one entry for each token of the prompt, None for its first, where that parameter is set.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None
    timings: Timings
    ttft_s: float | None
    latency_s: float
    request_id: str
    completions: tuple[Completion, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second after the first one, of a stream; None where fewer than two pieces make it undefined."""
        if self.ttft_s is None or self.completion_tokens < 2 or self.latency_s <= self.ttft_s:
            return None
        return (self.completion_tokens - 1) / (self.latency_s - self.ttft_s)


@dataclass(frozen=True)
class EmbedResult:
    """A prompt's embedding; `prompt_tokens`, `timings`, `latency_s` and `request_id` as in `GenerateResult`."""

    embedding: list[float]
    prompt_tokens: int
    timings: Timings
    latency_s: float
    request_id: str

    @classmethod
    def of_answer(cls, answer: GenerateResult) -> EmbedResult:
        """From an answer whose text is a JSON list of numbers. ValueError if it is none."""
        values = json.loads(answer.text)
        if not isinstance(values, list):
            raise ValueError("no list")
        return cls(values, answer.prompt_tokens, answer.timings, answer.latency_s, answer.request_id)


@dataclass(frozen=True)
class Health:
    """What works, from the outside in; `detail` says why the first thing that does not work does not."""

    server_live: bool
    model_ready: bool
    engine_ready: bool
    detail: str


@dataclass(frozen=True)
class ModelInfo:
    """A row of the server's repository index. `state` is READY, UNAVAILABLE, LOADING, UNLOADING or empty."""

    name: str
    version: str
    state: str
    reason: str
