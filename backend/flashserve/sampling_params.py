"""Request parameters: one table of names, types and ranges, and the only place where they are checked.

The request parser and the offline API share it. Names are those of vLLM's ``SamplingParams``. Values may arrive
as strings ("100", "0.5", "true", "[1, 2]"), because Triton's request parameters have no lists and load generators
send numbers as text. Nothing is accepted and ignored: a parameter is honoured, neutral, or refused by name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flashserve.coercion import plain, same, shorten
from flashserve.errors import InvalidArgument
from flashserve.parameter_kinds import INT32_MAX, INT64_MAX, Parameter, coerce
from flashserve.protocol import SamplingParams

MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_NAME_LENGTH = 256
MAX_BIASES = 1024
MAX_PENALTY = 1000  # flat already, and any logit times it is finite
MAX_LOGPROBS = 20  # as vLLM's default, and OpenAI's API
MAX_SAMPLES = 128  # a fraction of the requests that run at once


TABLE: tuple[Parameter, ...] = (
    # 1000 is flat already; the bound keeps float32 logits finite in the sampler.
    Parameter("temperature", "float", 0, 1000),
    Parameter("top_k", "int", 0, INT32_MAX, also=(-1,)),
    Parameter("top_p", "float", 0, 1, above_low=True),
    Parameter("min_p", "float", 0, 1),
    Parameter("seed", "int", -INT64_MAX - 1, INT64_MAX),  # -1: none, from clients that cannot leave it out
    Parameter("max_tokens", "int", 1, INT32_MAX),
    Parameter("min_tokens", "int", 0, INT32_MAX),
    Parameter("stop", "str_list", max_items=MAX_STOP_STRINGS, max_length=MAX_STOP_LENGTH),
    Parameter("stop_token_ids", "int_list", 0, INT32_MAX, max_items=MAX_STOP_TOKEN_IDS),
    Parameter("include_stop_str_in_output", "bool"),
    Parameter("ignore_eos", "bool"),
    Parameter("skip_special_tokens", "bool"),
    Parameter("truncate_prompt_tokens", "int", 1, INT32_MAX, also=(-1,)),
    Parameter("structured_outputs", "structure"),
    Parameter("allowed_token_ids", "int_list", 0, INT32_MAX),
    Parameter("n", "int", 1, MAX_SAMPLES),
    Parameter("presence_penalty", "float", -2, 2),
    Parameter("frequency_penalty", "float", -2, 2),
    Parameter("repetition_penalty", "float", 0, MAX_PENALTY, above_low=True),
    Parameter("logit_bias", "token_map", -100, 100, max_items=MAX_BIASES),
    Parameter("bad_words", "str_list", max_items=256, max_length=256, may_be_empty=True),
    # DRY and XTC: the names are those of text-generation-webui and llama.cpp.
    Parameter("dry_multiplier", "float", 0, 100),
    Parameter("dry_base", "float", 1, 4),  # 4^50, of the longest repetition that counts, is a float32
    Parameter("dry_allowed_length", "int", 1, 50),
    Parameter("dry_sequence_breakers", "str_list", max_items=MAX_STOP_STRINGS, max_length=64, may_be_empty=True),
    Parameter("xtc_probability", "float", 0, 1),
    Parameter("xtc_threshold", "float", 0, 1),
    # False is what OpenAI's chat API, and Triton's frontend after it, say for none.
    Parameter("logprobs", "int", 0, MAX_LOGPROBS, off=(False,)),
    Parameter("prompt_logprobs", "int", 0, MAX_LOGPROBS, off=(False,)),
    Parameter("prompt_token_ids", "int_list", 0, INT32_MAX, of_request=True),
    Parameter("priority", "int", -INT32_MAX - 1, INT32_MAX, of_request=True),
    Parameter("timeout_ms", "int", 1, INT32_MAX, of_request=True),
    # Triton's generate endpoint passes these two on: microseconds (0: none), and the request's id.
    Parameter("timeout", "int", 0, INT64_MAX, of_request=True),
    Parameter("id", "str", max_length=MAX_NAME_LENGTH, of_request=True),
    Parameter("cache_salt", "str", max_length=MAX_NAME_LENGTH, of_request=True),
    Parameter("traceparent", "str", max_length=MAX_NAME_LENGTH, of_request=True),
)
PARAMETERS: dict[str, Parameter] = {parameter.name: parameter for parameter in TABLE}

# What vLLM knows and flashserve does not (yet), with the values under which that makes no difference; null is
# always one of them. Triton's OpenAI frontend sends several of these with every request.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False, True),  # of a beam search
    "top_logprobs": (0,),
    "flat_logprobs": (False,),
    "logprob_token_ids": (),
    "logits_processors": ([],),
    "guided_decoding": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json_object": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "response_format": ({"type": "text"},),
    "lora_name": (),
    "spaces_between_special_tokens": (True, False),  # of tokenizers in Python; the fast ones, like ours, know none
    "detokenize": (True,),
    "output_kind": (),
    "extra_args": ({},),
    "skip_reading_prefix_cache": (False,),
    "skip_clone": (False,),
    "thinking_token_budget": (),
    "repetition_detection": (),
}

# Older names of vLLM, and what says the same now.
RENAMED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}

# Names of other APIs whose nearest spelling would mislead.
ALIASES = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "max_length": "max_tokens",
    "stop_sequences": "stop",
    "stop_words": "stop",
    "random_seed": "seed",
    "request_id": "id",
    "do_sample": "temperature",
}


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """What rides with the sampling parameters but belongs to the request."""

    prompt_token_ids: list[int] | None = None
    priority: int = 0
    timeout_s: float | None = None
    """From arrival to deadline: the shorter one of ``timeout_ms`` and Triton's ``timeout``."""
    request_id: str = ""
    cache_salt: str = ""
    traceparent: str = ""
    """W3C's header of that name: the trace that the request belongs to."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """Everything a mapping of parameters says."""

    sampling: SamplingParams
    options: RequestOptions = field(default_factory=RequestOptions)


def coerce_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check every name and value on its own; values come back in their parameter's type.

    What is null or an empty text is left out, and so are neutral values of parameters that we do not support.
    Raises InvalidArgument.
    """
    coerced: dict[str, Any] = {}
    for name, value in values.items():
        parameter = PARAMETERS.get(name)
        if parameter is None:
            _check_unsupported(name, value)
        elif value is not None and value != "" and not any(same(plain(value), off) for off in parameter.off):
            coerced[name] = coerce(parameter, value)
    return coerced


def parse_parameters(values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> Parameters:
    """Split and check all parameters of a request; ``defaults`` are the model's own (same names)."""
    coerced = coerce_all(values)
    request_level = {name: coerced.pop(name) for name in list(coerced) if PARAMETERS[name].of_request}
    return Parameters(_sampling(coerced, defaults or {}), _options(request_level))


def parse_sampling_params(values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> SamplingParams:
    """SamplingParams from a mapping, for callers that have no request-level keys. Raises InvalidArgument."""
    for name in values:
        if name in PARAMETERS and PARAMETERS[name].of_request:
            raise InvalidArgument(f"{name} belongs to the request, it is not a sampling parameter")
    return _sampling(coerce_all(values), defaults or {})


def _sampling(coerced: dict[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    merged = {**coerce_all(defaults), **coerced}
    if merged.get("top_k") == -1:
        merged["top_k"] = 0  # two spellings of "off" in vLLM; one behind this point
    if merged.get("seed") == -1:
        del merged["seed"]
    params = SamplingParams(**merged)
    if "allowed_token_ids" in merged:
        _check_allowed_tokens(params)
    wanted = params.structured_outputs
    if wanted is not None and wanted.close_json and params.logprobs is not None:
        raise InvalidArgument("structured_outputs.close_json cannot go with logprobs: what closes a text has none")
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        origin = "" if "max_tokens" in coerced else " (the model's default)"
        raise InvalidArgument(
            f"min_tokens must be in [0, max_tokens]; it is {params.min_tokens} of {params.max_tokens}{origin}"
        )
    return params


def _options(values: dict[str, Any]) -> RequestOptions:
    timeouts = [values[name] / unit for name, unit in (("timeout_ms", 1e3), ("timeout", 1e6)) if values.get(name)]
    return RequestOptions(
        prompt_token_ids=values.get("prompt_token_ids"),
        priority=values.get("priority", 0),
        timeout_s=min(timeouts, default=None),
        request_id=values.get("id", ""),
        cache_salt=values.get("cache_salt", ""),
        traceparent=values.get("traceparent", ""),
    )


def _check_allowed_tokens(params: SamplingParams) -> None:
    if not params.allowed_token_ids:
        raise InvalidArgument("allowed_token_ids must have at least one entry, or be left out")
    if params.structured_outputs is not None:
        raise InvalidArgument("allowed_token_ids cannot go with structured_outputs, whose tokens it might rule out")


# --- names -------------------------------------------------------------------------------------------------


def _check_unsupported(name: Any, value: Any) -> None:
    """Raise unless ``name`` is a parameter of vLLM that has no effect with this value."""
    if name not in NEUTRAL:
        raise unknown_parameter(name, (*PARAMETERS, *NEUTRAL))
    neutral = NEUTRAL[name]
    if value is None or value == "" or any(same(plain(value), item) for item in neutral):
        return
    only = f"; only {' or '.join(json.dumps(item) for item in neutral)} is" if neutral else ""
    if name in RENAMED:
        only = f'; structured_outputs={{"{RENAMED[name]}": …}} is its name now'
    raise InvalidArgument(f"{name}={shorten(value)} is not supported{only}")


def unknown_parameter(name: Any, known: tuple[str, ...]) -> InvalidArgument:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    text = name if isinstance(name, str) else repr(name)
    near = [ALIASES[text]] if text in ALIASES else difflib.get_close_matches(text[:64], known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return InvalidArgument(f"unknown parameter {shorten(text)}{hint}")
