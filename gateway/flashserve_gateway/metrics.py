"""The gateway's own metrics, in Prometheus' format. Each gateway has a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "flashserve_gateway:"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_MODEL_NAME_LENGTH = 100


class Metrics:
    """What happened since the start."""

    def __init__(self, in_flight: Callable[[], float], waiting: Callable[[], float]) -> None:
        """``in_flight`` and ``waiting`` are asked whenever metrics are read."""
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            f"{_PREFIX}requests", "Answers by endpoint and status; 499: the client had gone",
            ("endpoint", "status"), registry=registry,
        )  # fmt: skip
        self.retries = Counter(f"{_PREFIX}client_retries", "Requests that a client sent again", registry=registry)
        self.prompt_tokens = Counter(f"{_PREFIX}prompt_tokens", "Tokens read", ("model",), registry=registry)
        self.generation_tokens = Counter(f"{_PREFIX}generation_tokens", "Tokens written", ("model",), registry=registry)
        self.first_token = Histogram(
            f"{_PREFIX}time_to_first_token_seconds", "From the request to its first piece, of streams",
            ("model",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.duration = Histogram(
            f"{_PREFIX}request_duration_seconds", "From the request to the end of its answer",
            ("endpoint",), buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.batch_requests = Counter(
            f"{_PREFIX}batch_requests", "Answers to requests of batches; outcome: completed, failed",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.answer_cache = Counter(
            f"{_PREFIX}answer_cache", "Requests that may be answered from kept answers; outcome: hit, miss",
            ("outcome",), registry=registry,
        )  # fmt: skip
        self.watch("requests_in_flight", "Requests in an engine", in_flight)
        self.watch("requests_waiting", "Requests that wait since the engines' queues are full", waiting)

    def watch(self, name: str, words: str, function: Callable[[], float]) -> None:
        """A further gauge, asked for its value whenever metrics are read."""
        Gauge(f"{_PREFIX}{name}", words, registry=self._registry).set_function(function)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)

    def count_tokens(self, model: str, prompt: int, generated: int) -> None:
        """Of one answer."""
        self.prompt_tokens.labels(model[:_MODEL_NAME_LENGTH]).inc(prompt)
        self.generation_tokens.labels(model[:_MODEL_NAME_LENGTH]).inc(generated)
