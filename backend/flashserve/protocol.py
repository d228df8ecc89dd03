"""Messages between the stub and the engine process, and the types inside them.

Everything here is frozen and serialisable (msgpack through msgspec, arrays rather than maps: at 256 running
requests a step's message encodes in tens of microseconds). Times are seconds of ``time.monotonic()``, which all
processes of one machine share. This module imports nothing of ours.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
"""Why a request ended: a stop condition, a length limit, the client, its deadline, or a fault."""


GREEDY_BELOW = 1e-5
"""Temperatures below it are greedy, as in vLLM: dividing logits by less only loses their digits."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """How a request's tokens are chosen and when it ends. Names and meanings are vLLM's.

    Built by ``flashserve.sampling_params``, which checks every range once; nobody checks again.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    """64-bit; None draws one at admission."""
    max_tokens: int | None = None
    """None: what fits the context."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    """Keep this many tokens at the prompt's end."""
    n: int = 1
    """Samples of one prompt, the next one with the next seed."""


# --- stub to engine ---------------------------------------------------------------------------------------


class GenerateRequest(msgspec.Struct, frozen=True, array_like=True, tag="generate"):
    """Generate from ``prompt_token_ids``. The stub has validated all of it against the engine's limits."""

    request_id: int
    """Unique in this stub's life; the client's own id stays in the stub."""
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: float
    priority: int = 0
    """Lower goes first, as in vLLM."""
    deadline: float | None = None
    cache_salt: str = ""
    """Requests share cached prefixes only with those of the same salt."""


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End these requests now. Their last TokenOutput (finish_reason "abort") confirms it."""

    request_ids: list[int]
    samples: list[tuple[int, int]] = []
    """Single samples that have given tokens: (request id, index). The request's others go on."""


StubMessage = GenerateRequest | Abort

# --- engine to stub ---------------------------------------------------------------------------------------


class RequestTimings(msgspec.Struct, frozen=True, array_like=True):
    """What the engine saw of one request, sent with its first token and its end. None: not (yet) come."""

    arrival: float
    first_scheduled: float | None
    first_token: float | None
    last_token: float | None
    cached_tokens: int
    """Prompt tokens found in the prefix cache at the first admission."""
    preemptions: int


class ErrorInfo(msgspec.Struct, frozen=True, array_like=True):
    """A FlashserveError on the wire."""

    code: str
    message: str
    retry_after_ms: int | None = None


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sample of a request. Exactly one output of a sample has a finish_reason, its last."""

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: RequestTimings | None = None
    error: ErrorInfo | None = None
    index: int = 0
    """Which of the request's ``n`` samples."""


class Stats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The engine's state after a step. Counters count since this engine process started."""

    running: int
    waiting: int
    free_blocks: int
    """Blocks that no request holds (cached ones included)."""
    total_blocks: int
    steps: int
    prompt_tokens: int
    """Prompt tokens computed or found in the cache, counted once per request, at its first token."""
    generation_tokens: int
    prefix_cache_queries: int
    """Prompt tokens looked up in the prefix cache."""
    prefix_cache_hits: int
    """Prompt tokens found there."""
    preemptions: int
    prefill_chunks: int
    """Rows that computed a part of a prompt without reaching its end."""


class StepOutputs(msgspec.Struct, frozen=True, array_like=True, tag="step"):
    """All that one step gave, in one message. Sent also without outputs when only the state changed."""

    outputs: list[TokenOutput]
    stats: Stats


class EngineLimits(msgspec.Struct, frozen=True, array_like=True):
    """What the stub needs in order to check requests and to describe the model."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    device: str
    stream_interval: int = 1
    """Tokens of a request that one response may hold while the server is busy."""
    model_bytes: int = 0
    """What the engine takes beside its KV cache: of a GPU's memory, or of the machine's."""
    kv_cache_bytes: int = 0


class ModelCard(msgspec.Struct, frozen=True, array_like=True):
    """What a model brings along beside its weights. The engine has read it; the stub opens no file of a model but the
    tokenizer's."""

    tokenizer_file: str
    """A tokenizer.json: the model's own, or one converted from its SentencePiece or BPE files."""
    tokenizer_config: dict[str, Any]
    """tokenizer_config.json, with the chat templates put into place: "chat_template" is one, or several by name."""
    generation_config: dict[str, Any]
    """generation_config.json."""


class EngineReady(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded and warm."""

    limits: EngineLimits
    card: ModelCard


class EngineFailed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine cannot start and trying again would not help; the process ends after this."""

    error: ErrorInfo


EngineMessage = StepOutputs | EngineReady | EngineFailed
