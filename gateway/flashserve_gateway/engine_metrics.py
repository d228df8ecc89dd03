"""What the engines say of themselves at tritonserver's /metrics, for the page: asked at most once a second."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

log = logging.getLogger("flashserve_gateway")

_LIFETIME_S = 0.9  # pages ask once a second, and however many they are, the server is asked once
_TIMEOUT_S = 2.0
_GAUGES = {
    "vllm:num_requests_running": "running",
    "vllm:num_requests_waiting": "waiting",
    "vllm:kv_cache_usage_perc": "kv_usage",
    "vllm:generation_tokens": "generated",
    "vllm:prefix_cache_queries": "queries",
    "vllm:prefix_cache_hits": "hits",
    "flashserve:model_bytes": "model_bytes",
    "flashserve:kv_cache_bytes": "kv_cache_bytes",
}
_HISTOGRAMS = {"vllm:time_to_first_token_seconds": "ttft", "vllm:inter_token_latency_seconds": "itl"}


class EngineMetrics:
    """The figures of all servers' models."""

    def __init__(self, addresses: Sequence[str]) -> None:
        """``addresses``: HOST:PORT of tritonservers' metrics."""
        self._urls = [f"http://{address}/metrics" for address in addresses]
        self._http: httpx.AsyncClient | None = None
        self._lock = asyncio.Lock()
        self._read = 0.0
        self._models: dict[str, dict[str, Any]] = {}
        self._memory: dict[str, dict[str, int]] = {}

    async def models(self) -> dict[str, dict[str, Any]]:
        """By model: gauges and counters, and histograms as lists of [edge, count below], summed over servers."""
        async with self._lock:
            if time.monotonic() - self._read > _LIFETIME_S:
                texts = await asyncio.gather(*map(self._text, self._urls))
                self._models = {}
                for text in texts:
                    _add(self._models, text)
                self._read = time.monotonic()
                for name, figures in self._models.items():
                    if figures["model_bytes"]:
                        self._memory[name] = {kind: int(figures[kind]) for kind in ("model_bytes", "kv_cache_bytes")}
            return self._models

    async def memory(self) -> dict[str, dict[str, int]]:
        """By model: the bytes that it and its KV cache take, of one that is not loaded when it last was."""
        await self.models()
        return self._memory

    async def aclose(self) -> None:
        """Closes the connections."""
        if self._http is not None:
            await self._http.aclose()

    async def _text(self, url: str) -> str:
        if self._http is None:
            self._http = httpx.AsyncClient(trust_env=False, timeout=_TIMEOUT_S)
        try:
            response = await self._http.get(url)
            return response.text if response.status_code == 200 else ""
        except httpx.HTTPError as error:
            log.debug("%s: %s", url, error)
            return ""


def _add(models: dict[str, dict[str, Any]], text: str) -> None:
    """Adds one server's figures. A model's instances have a series each."""
    for family in text_string_to_metric_families(text):
        name = _GAUGES.get(family.name)
        histogram = _HISTOGRAMS.get(family.name)
        if name is None and histogram is None:
            continue
        for sample in family.samples:
            model = models.setdefault(sample.labels.get("model", ""), _empty())
            if name is not None:
                model[name] += sample.value
            elif histogram is not None and sample.name.endswith("_bucket"):
                edge = float(sample.labels["le"])
                buckets = model[histogram]
                known = next((bucket for bucket in buckets if bucket[0] == (None if math.isinf(edge) else edge)), None)
                if known is None:
                    buckets.append([None if math.isinf(edge) else edge, sample.value])
                else:
                    known[1] += sample.value


def _empty() -> dict[str, Any]:
    return {**dict.fromkeys(_GAUGES.values(), 0.0), **{name: [] for name in _HISTOGRAMS.values()}}
