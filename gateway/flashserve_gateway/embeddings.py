"""Embeddings: one for each input of a request."""

from __future__ import annotations

import asyncio
import base64
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashserve_client import EmbedResult

from . import parameters
from .completions import is_ids
from .errors import invalid
from .gateway import Call
from .merging import gathered
from .pool import Ask

_FORMATS = ("float", "base64")


@dataclass(frozen=True)
class EmbeddingRequest:
    """A checked request."""

    asks: tuple[Ask, ...]
    as_base64: bool


def read_embeddings(call: Call) -> EmbeddingRequest:
    """Checks a body. Raises ApiError for what the gateway knows to be wrong; the engine checks the rest."""
    body = call.body
    parameters.check_names(body, parameters.EMBEDDING, frozenset())
    encoding = parameters.read(body, "encoding_format", str, _FORMATS[0])
    if encoding not in _FORMATS:
        raise invalid("encoding_format", f"encoding_format must be {' or '.join(_FORMATS)}")
    model = parameters.read_model(body)
    priority = call.caller.priority(parameters.read_priority(body))
    names = ("dimensions", "pooling", "normalize", "truncate_prompt_tokens", "cache_salt")
    params = {name: body[name] for name in names if body.get(name) is not None}
    inputs = _read_inputs(body.get("input"), call.gateway.settings.limits.embedding_inputs)
    return EmbeddingRequest(
        asks=tuple(
            Ask(model, text, params, _request_id(call, index, len(inputs)), priority, stream=False, embeds=True)
            for index, text in enumerate(inputs)
        ),
        as_base64=encoding == "base64",
    )


def _request_id(call: Call, index: int, count: int) -> str:
    return call.request_id if count == 1 else f"{call.request_id}-{index}"


def _read_inputs(value: object, limit: int) -> list[str | list[int]]:
    """A string, token ids, or a list of either. Raises ApiError."""
    inputs = [value] if isinstance(value, str) or is_ids(value) else value
    if not isinstance(inputs, list) or not inputs:
        raise invalid("input", "input must be a string, a list of token ids, or a non-empty list of these")
    if len(inputs) > limit:
        raise invalid("input", f"input: at most {limit} in one request, not {len(inputs)}")
    for index, one in enumerate(inputs):
        if not (isinstance(one, str) and one) and not is_ids(one):
            raise invalid("input", f"input[{index}] must be a non-empty string or a non-empty list of token ids")
    return inputs


async def embed(call: Call, request: EmbeddingRequest) -> dict[str, Any]:
    """All embeddings, in the order of the inputs. Raises ApiError."""
    at_once = min(len(request.asks), call.gateway.settings.limits.embeddings_at_once)
    if (allowed := call.caller.key.requests_in_flight) is not None:
        at_once = min(at_once, allowed)
    places = asyncio.Semaphore(at_once)

    async def one(ask: Ask) -> EmbedResult:
        async with places:
            return await call.embedded(ask)

    model = request.asks[0].model
    async with call.admitted(model, request.asks, at_once):
        results = await gathered([one(ask) for ask in request.asks])
    tokens = sum(result.prompt_tokens for result in results)
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": as_base64(result.embedding) if request.as_base64 else result.embedding,
        }
        for index, result in enumerate(results)
    ]
    return {
        "object": "list",
        "data": data,
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def as_base64(values: Sequence[float]) -> str:
    """Float32, little endian: what OpenAI's client asks for where its caller names no format."""
    numbers = array("f", values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode()
