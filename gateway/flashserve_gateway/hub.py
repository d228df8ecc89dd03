"""Search of the Hugging Face hub for models that generate text.

Its REST API is asked directly: huggingface_hub's `list_models` tries five times, without a time limit, in a thread
that nobody can end, and a page waits for the answer. The variables HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are that
library's.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import Any

import httpx
import orjson

from .errors import ApiError

_ENDPOINT = "https://huggingface.co"
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 8 << 20
_EXPAND = ("downloads", "likes", "gated", "safetensors", "gguf", "lastModified")
# Of safetensors' element types.
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8,
         "F8_E4M3": 8, "F8_E5M2": 8, "BOOL": 8, "I4": 4, "U4": 4, "F4": 4}  # fmt: skip
_DEFAULT_BITS = 16


@dataclass(frozen=True)
class HubModel:
    """A row of the hub's answer; None where it does not say."""

    id: str
    downloads: int
    likes: int
    gated: bool
    """Whether its owner's terms must be agreed to first."""
    format: str
    """safetensors or gguf."""
    parameters: int | None
    weight_bytes: int | None
    """As stored; of a GGUF repository, which holds several quantisations, unknown."""
    updated: str


async def search_hub(words: str, limit: int) -> list[HubModel]:
    """The models that have most downloads among those that the words find and whose weights can be read here. Raises
    ApiError (503, 502) within ten seconds if the hub does not answer."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ApiError(503, "the hub is not asked: HF_HUB_OFFLINE is set", code="hub_offline")
    endpoint = os.environ.get("HF_ENDPOINT", _ENDPOINT).rstrip("/")
    token = os.environ.get("HF_TOKEN", "")
    query = httpx.QueryParams(
        {"search": words, "pipeline_tag": "text-generation", "sort": "downloads", "limit": limit, "expand": _EXPAND}
    )
    try:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        rows = await asyncio.wait_for(_read(f"{endpoint}/api/models", query, headers), _TIMEOUT_S)
    except asyncio.TimeoutError:
        raise _unreachable(endpoint, f"no answer within {_TIMEOUT_S:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(endpoint, str(error) or type(error).__name__) from None
    return [row for row in map(_model, rows) if row is not None]


def _unreachable(endpoint: str, reason: str) -> ApiError:
    return ApiError(
        503, f"the hub ({endpoint}) cannot be reached: {reason}", code="hub_unreachable", retry_after_s=10.0
    )


async def _read(url: str, query: httpx.QueryParams, headers: dict[str, str]) -> list[Any]:
    async with (
        httpx.AsyncClient(timeout=_TIMEOUT_S) as http,
        http.stream("GET", url, params=query, headers=headers) as response,
    ):
        if response.status_code != 200:
            raise ApiError(502, f"the hub answered {response.status_code}", code="hub_error", retry_after_s=10.0)
        body = b""
        async for part in response.aiter_bytes():
            body += part
            if len(body) > _MAX_ANSWER_BYTES:
                raise ApiError(502, "the hub's answer is too long", code="hub_error")
    try:
        rows = orjson.loads(body)
    except orjson.JSONDecodeError:
        rows = None
    if not isinstance(rows, list):
        raise ApiError(502, "the hub's answer cannot be read", code="hub_error")
    return rows


def _model(row: Any) -> HubModel | None:
    """None for weights in no format that is read here."""
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        return None
    safetensors, gguf = row.get("safetensors"), row.get("gguf")
    if isinstance(safetensors, dict):
        counts = safetensors.get("parameters")
        counts = counts if isinstance(counts, dict) else {}
        bits = sum(_count(count) * _BITS.get(kind, _DEFAULT_BITS) for kind, count in counts.items())
        kind, parameters, weight_bytes = "safetensors", safetensors.get("total"), bits // 8 or None
    elif isinstance(gguf, dict):
        kind, parameters, weight_bytes = "gguf", gguf.get("total"), None
    else:
        return None
    return HubModel(
        id=row["id"],
        downloads=_count(row.get("downloads")),
        likes=_count(row.get("likes")),
        gated=bool(row.get("gated")),
        format=kind,
        parameters=_count(parameters) or None,
        weight_bytes=weight_bytes,
        updated=str(row.get("lastModified") or "")[:10],
    )


def _count(value: Any) -> int:
    return value if type(value) is int else 0
