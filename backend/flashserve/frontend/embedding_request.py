"""The input ``embedding_request``: {"input": text or token ids, "pooling_params": {...}}."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashserve.coercion import shorten
from flashserve.errors import InvalidArgument
from flashserve.pooling_params import parse_pooling_params
from flashserve.protocol import EngineLimits, PoolingParams, SamplingParams
from flashserve.sampling_params import PARAMETERS, coerce_all
from flashserve.text.prompt import check_prompt
from flashserve.text.strict_json import parse_object
from flashserve.text.tokenizer import Tokenizer

NAME = "embedding_request"
KEYS = ("input", "pooling_params")


def check_embedding_options(values: Mapping[str, Any], flags: Mapping[str, bool]) -> None:
    """Raises InvalidArgument for what is about tokens that are generated. ``values``: the request's parameters."""
    for name in values:
        if not PARAMETERS[name].of_request and name != "truncate_prompt_tokens":
            raise InvalidArgument(f"{NAME} takes no sampling parameters, but {name} is given")
    if flags.get("stream"):
        raise InvalidArgument(f"stream=true: the answer to an {NAME} comes in one piece")
    if not flags.get("exclude_input_in_output", True):
        raise InvalidArgument(f"exclude_input_in_output=false: the answer to an {NAME} is no text to go before")


def read_embedding_request(
    text: str, params: SamplingParams, tokenizer: Tokenizer, limits: EngineLimits
) -> tuple[list[int], PoolingParams]:
    """The prompt, cut as ``params`` say, and what its embedding is to be. Raises InvalidArgument."""
    request = parse_object(text, NAME)
    for key in request:
        if key not in KEYS:
            raise InvalidArgument(f"unknown key {shorten(key)} in {NAME}, which takes {' and '.join(KEYS)}")
    options = request.get("pooling_params") or {}
    if not isinstance(options, dict):
        raise InvalidArgument(f"{NAME}.pooling_params must be an object, not {shorten(options)}")
    pooling = parse_pooling_params(options, limits.hidden_size)
    name, given = f"{NAME}.input", request.get("input")
    if isinstance(given, str):
        token_ids = tokenizer.encode(
            given,
            add_special_tokens=True,
            max_tokens=limits.max_model_len,
            overlong=params.truncate_prompt_tokens is not None,
            field=name,
        )
    elif isinstance(given, list):
        token_ids = _token_ids(name, given)
    else:
        raise InvalidArgument(f"{name} must be a string or a list of token ids, not {shorten(given)}")
    return check_prompt(name, token_ids, params, limits, room=0), pooling


def _token_ids(name: str, given: list[Any]) -> list[int]:
    try:
        return coerce_all({"prompt_token_ids": given})["prompt_token_ids"]
    except InvalidArgument as error:
        raise InvalidArgument(error.message.replace("prompt_token_ids", name, 1)) from None
