"""The server's own view: its /metrics, once a second."""

from __future__ import annotations

import http.client
import re
import time
from urllib.parse import urlsplit

import gevent

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
# Our name: the server's, which vLLM's exporters share.
GAUGES = {
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
    "kv_usage": "vllm:kv_cache_usage_perc",
}
COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens_total",
    "generation_tokens": "vllm:generation_tokens_total",
    "requests": "vllm:request_success_total",
    "preemptions": "vllm:num_preemptions_total",
    "prefix_cache_queries": "vllm:prefix_cache_queries_total",
    "prefix_cache_hits": "vllm:prefix_cache_hits_total",
}
_NAMES = {name: ours for ours, name in {**GAUGES, **COUNTERS}.items()}
_SAMPLE = re.compile(r'^([a-z_:]+)\{[^}\n]*model_name="([^"]*)"[^}\n]*\} (\S+)', re.MULTILINE)


def parse_metrics(text: str, model: str) -> dict[str, float]:
    """One model's values, by our names; those of several engines and reasons added up."""
    values: dict[str, float] = {}
    for name, of_model, value in _SAMPLE.findall(text):
        if of_model == model and name in _NAMES:
            values[_NAMES[name]] = values.get(_NAMES[name], 0.0) + float(value)
    return values


class Scraper:
    """``samples`` grows while `run` runs; it stays empty where nothing answers."""

    def __init__(self, url: str | None, model: str) -> None:
        self._url = url
        self._model = model
        self._stopped = False
        self.samples: list[dict[str, float]] = []

    def run(self, start: float) -> None:
        while self._url is not None and not self._stopped:
            before = time.time()
            try:
                values = parse_metrics(self._read(self._url), self._model)
            except (OSError, http.client.HTTPException, ValueError):
                values = {}
            if values:
                self.samples.append({"at_s": (before + time.time()) / 2 - start, **values})
            gevent.sleep(max(0.05, INTERVAL_S - (time.time() - before)))

    def _read(self, url: str) -> str:
        parts = urlsplit(url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.netloc, timeout=TIMEOUT_S)
        try:
            connection.request("GET", parts.path or "/metrics")
            return connection.getresponse().read().decode("utf-8", "replace")
        finally:
            connection.close()

    def stop(self) -> None:
        self._stopped = True
