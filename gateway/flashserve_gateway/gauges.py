"""What a server's engines say of their load at tritonserver's /metrics: what routing looks at, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

log = logging.getLogger("flashserve_gateway")

_TIMEOUT_S = 2.0
_MOST_BYTES = 16 << 20
_LINE = re.compile(
    r"^(vllm:num_requests_running|vllm:num_requests_waiting|vllm:kv_cache_usage_perc"
    r'|flashserve:engine_ready|flashserve:engine_stalled)\{(?:.*,)?model="([^"]*)".*\} (\S+)$',
    re.MULTILINE,
)  # 0.8 ms for the 800 lines of three models, for which prometheus_client's parser takes 37


@dataclass
class Gauges:
    """Of one model in one server, summed over its engines."""

    requests: int = 0
    """That run or wait, whoever sent them."""
    kv_usage: float = 0.0
    """Of the fullest engine."""
    is_healthy: bool = True
    """Whether some engine is there and makes steps."""


async def read_gauges(http: httpx.AsyncClient, address: str) -> Mapping[str, Gauges]:
    """By model; empty if the server does not say. ``address``: HOST:PORT of its metrics."""
    try:
        response = await asyncio.wait_for(http.get(f"http://{address}/metrics"), _TIMEOUT_S)
    except (httpx.HTTPError, asyncio.TimeoutError) as error:
        log.debug("%s: %s", address, error)
        return {}
    return parse_gauges(response.text[:_MOST_BYTES]) if response.status_code == 200 else {}


def parse_gauges(text: str) -> dict[str, Gauges]:
    """By model. ``text``: in Prometheus' format."""
    found: dict[str, Gauges] = {}
    ready: dict[str, float] = {}
    for name, model, value in _LINE.findall(text):
        gauges, number = found.setdefault(model, Gauges()), float(value)
        if name == "vllm:kv_cache_usage_perc":
            gauges.kv_usage = max(gauges.kv_usage, number)
        elif name.startswith("vllm:"):
            gauges.requests += int(number)
        else:
            ready[model] = ready.get(model, 0.0) + (number if name == "flashserve:engine_ready" else -number)
    for model, engines in ready.items():
        found[model].is_healthy = engines > 0
    return found
