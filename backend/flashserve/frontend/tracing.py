"""OpenTelemetry spans of each request: the whole, and below it queue, prefill and decode.

On where OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT) names a collector; all else is the SDK's
own environment, too (OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, …). Names and attributes are those of OpenTelemetry's
conventions for generative AI. A request joins its client's trace by the parameter ``traceparent`` (W3C).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

from flashserve.errors import FlashserveError
from flashserve.frontend.generation import Generation
from flashserve.protocol import RequestTimings

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
STOP_TIMEOUT_S = 1.0
OPERATION = "text_completion"


class Tracing:
    """Owns the SDK's exporting thread. ``record`` may be called by any thread; it takes 0.2 ms."""

    def __init__(self, model: str, exporter: Any, resource: Any) -> None:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._model = model
        self._exporter = exporter
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("flashserve")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, generation: Generation, reason: str, error: FlashserveError | None) -> None:
        """A request has ended."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        # Times of requests are those of the monotonic clock.
        offset_s = time.time() - time.monotonic()
        timings = generation.timings
        end = generation.last_token_time if error is None else time.monotonic()
        span = self._tracer.start_span(
            f"{OPERATION} {self._model}",
            context=self._propagator.extract({"traceparent": generation.parsed.traceparent}),
            kind=SpanKind.SERVER,
            start_time=_ns(generation.message.arrival + offset_s),
            attributes=self._attributes(generation, reason),
        )
        if error is not None:
            span.set_attribute("error.type", error.code)
            span.set_status(Status(StatusCode.ERROR, error.message))
        below = set_span_in_context(span)
        for name, began, ended in _parts(timings, generation.last_token_time):
            part = self._tracer.start_span(name, context=below, start_time=_ns(began + offset_s))
            part.end(_ns(ended + offset_s))
        span.end(_ns((end if end is not None else time.monotonic()) + offset_s))

    def _attributes(self, generation: Generation, reason: str) -> dict[str, Any]:
        timings, params = generation.timings, generation.message.params
        attributes: dict[str, Any] = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": "flashserve",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.response.finish_reasons": [reason] * params.n,
            "gen_ai.usage.input_tokens": len(generation.message.prompt_token_ids),
            "gen_ai.usage.output_tokens": generation.num_tokens,
        }
        if generation.parsed.request_id:
            attributes["gen_ai.response.id"] = generation.parsed.request_id
        if timings is not None:
            attributes["flashserve.cached_tokens"] = timings.cached_tokens
            attributes["flashserve.preemptions"] = timings.preemptions
        return attributes

    def stop(self) -> None:
        """Send what is left, within a bound: a collector that is gone must not hold up an unload."""
        thread = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        thread.start()
        thread.join(STOP_TIMEOUT_S)
        if thread.is_alive():
            self._exporter.shutdown()  # gives up between its tries, which go on for a minute otherwise
            thread.join(STOP_TIMEOUT_S)


def start_tracing(model: str) -> Tracing | None:
    """Tracing, if the environment names a collector; None with a line in the log if the SDK is missing."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
    except ImportError:
        log.warning("no traces, though %s is set: pip install 'flashserve[tracing]'", ENDPOINTS[0])
        return None
    # Resource.create lets OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES come before this.
    resource = Resource.create({} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": "flashserve"})
    return Tracing(model, OTLPSpanExporter(), resource)


def _parts(timings: RequestTimings | None, last_token: float | None) -> list[tuple[str, float, float]]:
    """The parts of a request's life that it came to."""
    if timings is None or timings.first_scheduled is None:
        return []
    parts = [("queue", timings.arrival, timings.first_scheduled)]
    if timings.first_token is not None:
        parts.append(("prefill", timings.first_scheduled, timings.first_token))
        if last_token is not None:
            parts.append(("decode", timings.first_token, max(timings.first_token, last_token)))
    return parts


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
