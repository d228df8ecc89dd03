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


GrammarKind = Literal["json", "regex", "choice", "grammar"]


class StructuredOutputs(msgspec.Struct, frozen=True, array_like=True):
    """The form that a text must have. Built by ``flashserve.structured_outputs``."""

    kind: GrammarKind
    text: str
    """A JSON schema, a regular expression, a JSON list of strings, a grammar in Lark."""
    whitespace_pattern: str | None = None
    """Between the parts of JSON; None: the engine's own, empty: nothing."""
    close_json: bool = False
    """Complete the text when ``max_tokens`` is near."""


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
    """Keep this many tokens at the prompt's end; -1: as many as fit the context."""
    structured_outputs: StructuredOutputs | None = None
    allowed_token_ids: tuple[int, ...] = ()
    """No others are chosen; empty: all may be."""
    n: int = 1
    """Samples of one prompt, the next one with the next seed."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    """What is added to the logits of single tokens."""
    bad_words: tuple[str, ...] = ()
    dry_multiplier: float = 0.0
    """0 is off; this and the next three are of the sampler DRY, which penalises tokens that would repeat a sequence."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    xtc_probability: float = 0.0
    """0 is off; this and the next one are of the sampler XTC, which excludes all but the least likely good choice."""
    xtc_threshold: float = 0.1
    logprobs: int | None = None
    """Log-probabilities of the chosen tokens and of so many of the most probable ones; None: of none."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens, but for the first, before which there is nothing."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """``bad_words`` as tokens: filled in by ``text.words``, as the next one."""
    dry_breaker_ids: tuple[int, ...] = ()

    @property
    def penalizes(self) -> bool:
        """Whether the logits of tokens change that the prompt or the text already holds."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def needs_known_tokens(self) -> bool:
        """Whether the next token cannot be chosen before the host knows all tokens until there."""
        return self.dry_multiplier > 0 or any(len(ids) > 1 for ids in self.bad_word_ids)


Pooling = Literal["last", "mean", "cls"]
"""Which of a prompt's final hidden states become its embedding: the last token's, the mean of all, the first's."""


class PoolingParams(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """What a prompt's embedding is to be. Built by ``flashserve.pooling_params``, which checks every range once."""

    pooling: Pooling = "last"
    dimensions: int | None = None
    """Keep the first of them, as Matryoshka embeddings allow (Kusupati et al., 2022). None: all."""
    normalize: bool = True
    """To length 1, after the cut."""


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
    pooling: PoolingParams | None = None
    """Answer with the prompt's embedding instead of tokens; ``params`` then has ``max_tokens`` 0 and ``n`` 1."""
    return_progress: bool = False
    """Tell how far the prompt is after each step that computed a part of it."""


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


class PromptProgress(msgspec.Struct, frozen=True, array_like=True):
    """How far a prompt is before its first token. Names are those of llama.cpp's ``prompt_progress``."""

    total: int
    """Tokens of the prompt."""
    cache: int
    """Of these, found in the prefix cache."""
    processed: int
    """Of these, computed or found in the cache."""
    time_ms: float
    """Since the request was first scheduled."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A token's log-probability by the raw logits: before temperature, penalties, masks."""

    logprob: float
    rank: int
    """1 plus the number of more probable tokens."""
    top: list[tuple[int, float]]
    """Token ids and log-probabilities of the most probable tokens, as many as the request wants; falling."""


class Logprobs(msgspec.Struct, frozen=True, array_like=True):
    """Of what an output brings; empty where nothing was asked for."""

    tokens: list[TokenLogprob]
    """One for each of the output's ``token_ids``, if log-probabilities of these are wanted."""
    prompt: list[TokenLogprob]
    """Of the prompt's next tokens, from its second one on: they come in chunks, with the request's first sample."""


class TokenOutput(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """New tokens of one sample of a request. Exactly one output of a sample has a finish_reason, its last."""

    request_id: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    timings: RequestTimings | None = None
    error: ErrorInfo | None = None
    index: int = 0
    """Which of the request's ``n`` samples."""
    logprobs: Logprobs | None = None
    """None where the request asked for none."""
    embedding: bytes | None = None
    """Of a request with ``pooling``, with its end: float32, little endian, neither cut nor normalised."""
    progress: PromptProgress | None = None


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
    hidden_size: int = 0
    """Dimensions of an embedding."""
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
