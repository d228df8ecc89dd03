"""Which event moves which metric."""

from __future__ import annotations

from collections.abc import Sequence

from flashserve.frontend.generation import Generation
from flashserve.frontend.metrics import Metrics
from flashserve.frontend.responses import time_spans
from flashserve.protocol import FinishReason, RequestTimings, Stats

COUNTERS_OF_STATS = {
    "vllm:prompt_tokens_total": "prompt_tokens",
    "vllm:generation_tokens_total": "generation_tokens",
    "vllm:prefix_cache_queries_total": "prefix_cache_queries",
    "vllm:prefix_cache_hits_total": "prefix_cache_hits",
    "vllm:num_preemptions_total": "preemptions",
    "flashserve:prefill_chunks_total": "prefill_chunks",
    "flashserve:engine_steps_total": "steps",
}
HISTOGRAMS_OF_SPANS = {
    "queue": "vllm:request_queue_time_seconds",
    "prefill": "vllm:request_prefill_time_seconds",
    "decode": "vllm:request_decode_time_seconds",
}


def record_stats(metrics: Metrics, before: Stats | None, now: Stats) -> None:
    """Gauges from ``now``; counters by what they gained since ``before`` (None: a new engine, counting from 0)."""
    metrics.set("vllm:num_requests_running", now.running)
    metrics.set("vllm:num_requests_waiting", now.waiting)
    metrics.set("vllm:kv_cache_usage_perc", 1 - now.free_blocks / now.total_blocks)
    for name, field in COUNTERS_OF_STATS.items():
        gained = getattr(now, field) - (getattr(before, field) if before is not None else 0)
        if gained:
            metrics.add(name, gained)


def record_first_token(metrics: Metrics, timings: RequestTimings) -> None:
    """A request got its first token, or ended before it."""
    if timings.first_token is not None:
        metrics.observe("vllm:time_to_first_token_seconds", timings.first_token - timings.arrival)


def record_gaps(metrics: Metrics, seconds: Sequence[float]) -> None:
    """Tokens after a request's first: the time since the one before, of a step's requests."""
    for name in ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"):
        metrics.observe_all(name, seconds)


def record_end(metrics: Metrics, generation: Generation, reason: FinishReason) -> None:
    """A request ended by itself: its latencies and sizes."""
    timings, last = generation.timings, generation.last_token_time
    metrics.add("vllm:request_success_total", label_value=reason)
    metrics.observe("vllm:request_prompt_tokens", len(generation.message.prompt_token_ids))
    metrics.observe("vllm:request_generation_tokens", generation.num_tokens)
    metrics.observe("vllm:request_params_n", len(generation.completions))
    if timings is not None and last is not None:
        longest = max(len(completion.token_ids) for completion in generation.completions)
        _record_spans(metrics, timings, last, longest)
    metrics.hurry.set()


def _record_spans(metrics: Metrics, timings: RequestTimings, last: float, num_tokens: int) -> None:
    metrics.observe("vllm:e2e_request_latency_seconds", last - timings.arrival)
    spans = time_spans(timings, last)
    for span, name in HISTOGRAMS_OF_SPANS.items():
        value = spans[span]
        if value is not None:
            metrics.observe(name, value)
    decode = spans["decode"]
    if decode is not None and num_tokens > 1:
        metrics.observe("vllm:request_time_per_output_token_seconds", decode / (num_tokens - 1))
