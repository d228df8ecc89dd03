"""Where each field of a request goes: to the engine, to the gateway, nowhere, or back with a refusal.

The engine checks types and ranges of what it is given and names the field; here are only names, and the fields that
the gateway itself reads.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from . import abilities
from .errors import invalid

T = TypeVar("T")

# Sampling parameters of OpenAI's API, and those of vLLM's that clients send as extra_body.
ENGINE = frozenset(
    {"temperature", "top_p", "seed", "stop", "top_k", "min_p", "min_tokens", "stop_token_ids",
     "include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "truncate_prompt_tokens", "cache_salt",
     "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "bad_words", "dry_multiplier",
     "dry_base", "dry_allowed_length", "dry_sequence_breakers", "xtc_probability", "xtc_threshold",
     "spaces_between_special_tokens", "structured_outputs", "allowed_token_ids"}
)  # fmt: skip
# Of OpenAI's service, and without a meaning for an engine of one's own; every client sends some of them.
IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
     "safety_identifier"}
)  # fmt: skip
COMMON = frozenset(
    {
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "priority",
        "n",
        "return_progress",
        "response_format",
        "close_json",
    }
)
CHAT = COMMON | {
    "messages",
    "max_completion_tokens",
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "logprobs",
    "top_logprobs",
}
COMPLETION = COMMON | {"prompt", "echo", "logprobs"}
EMBEDDING = frozenset(
    {"model", "input", "encoding_format", "dimensions", "pooling", "normalize", "truncate_prompt_tokens", "cache_salt",
     "priority"}
)  # fmt: skip

INT32_MAX = 2**31 - 1
"""As max_tokens: until the context is full."""


def check_names(
    body: Mapping[str, Any], own: frozenset[str], generates: frozenset[str] = ENGINE | abilities.FIELDS
) -> None:
    """Raises ApiError for a field that means nothing to anybody. ``own`` are the endpoint's, ``generates`` those of
    every endpoint whose answers are generated."""
    known = own | generates | IGNORED
    for name in body:
        if name not in known:
            near = difflib.get_close_matches(name[:64], known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise invalid(name[:64], f"unknown parameter {name[:64]!r}{hint}", "unknown_parameter")


def engine_params(body: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters, under the engine's names."""
    return {name: value for name, value in body.items() if name in ENGINE and value is not None}


def read(body: Mapping[str, Any], name: str, kind: type[T], default: T) -> T:
    """A field that the gateway reads. Raises ApiError if it is of another type; null means the default."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise invalid(name, f"{name} must be {_WORDS[kind]}, not {_word(value)}")
    return value


def read_count(body: Mapping[str, Any], name: str) -> int | None:
    """A positive integer, or None. Raises ApiError."""
    if body.get(name) is None:
        return None
    count = read(body, name, int, 0)
    if not 1 <= count <= INT32_MAX:
        raise invalid(name, f"{name} must be an integer in [1, 2^31-1], not {count}")
    return count


def read_samples(body: Mapping[str, Any], limit: int) -> int:
    """How many answers are wanted to one prompt. Raises ApiError."""
    count = read_count(body, "n") or 1
    if count > limit:
        raise invalid("n", f"n: at most {limit}, not {count}")
    return count


def read_progress_wanted(body: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """What `return_progress`, llama.cpp's, adds to a request. Raises ApiError."""
    wanted = read(body, "return_progress", bool, False)
    if wanted and not stream:
        raise invalid("return_progress", "return_progress: only a stream tells how far its prompt is (stream: true)")
    return {"return_progress": True} if wanted else {}


def read_priority(body: Mapping[str, Any]) -> int | None:
    """An integer, or None, which leaves it to the key. Raises ApiError."""
    return None if body.get("priority") is None else read(body, "priority", int, 0)


def read_model(body: Mapping[str, Any]) -> str:
    """The model's name. Raises ApiError."""
    name = read(body, "model", str, "")
    if not name:
        raise invalid("model", "model: you must name a model; GET /v1/models lists them")
    return name


def read_usage_wanted(body: Mapping[str, Any], stream: bool) -> bool:
    """Whether a stream is to end with its usage. Raises ApiError."""
    options = read(body, "stream_options", dict, {})
    if options and not stream:
        raise invalid("stream_options", "stream_options: only a stream has them (stream: true)")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise invalid(f"stream_options.{name[:64]}", f"unknown parameter stream_options.{name[:64]}")
    return read(options, "include_usage", bool, False)


_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "an integer",
    str: "a string",
    list: "a list",
    dict: "an object",
    float: "a number",
}


def _word(value: Any) -> str:
    return "null" if value is None else _WORDS.get(type(value), type(value).__name__)
