"""Metrics under vLLM's names, collected here and passed on to Triton's own /metrics in batches.

One metric operation of the Python backend is a round trip to tritonserver: 20-30 µs on an idle machine, 90-180 on a
busy one. At thousands of tokens per second nothing may cost that per token. So values are kept in plain Python and a
thread passes on what changed: a few milliseconds after a request's end, under load once a second. Triton's histograms
take one value per operation: a flush passes on at most :data:`OBSERVATIONS_PER_FLUSH` of each, and where more came in,
as many of each bucket as its share is. Quantiles then stay right; ``_count`` falls behind the counters of tokens and
requests, which are always exact.
"""

from __future__ import annotations

import bisect
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashserve.errors import INTERNAL, INVALID_ARG, UNAVAILABLE

log = logging.getLogger(__name__)

GAUGE_PERIOD_S = 0.05  # one gauge changes with each step, three at most: 20-60 round trips per second
COUNTER_PERIOD_S = 1.0  # at the latest
FLUSH_SHARE = 0.02  # of the time: what sooner flushes may take, whether Triton is quick or slow just now
FLUSH_CREDIT_S = 0.1  # may be saved up: some 50 requests in a row are counted at once
OBSERVATIONS_PER_FLUSH = 1000  # of one histogram: 20 ms
DECLARE_PERIOD_S = 0.25  # between looks at the processes, until the predecessor has ended
STOP_TIMEOUT_S = 2.0

LATENCY_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
REQUEST_TIME_BUCKETS = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0)
TOKEN_COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@dataclass(frozen=True)
class MetricSpec:
    """One metric family; histograms have buckets, labelled ones a label that callers fill in."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    label: str | None = None
    buckets: tuple[float, ...] = ()
    label_values: tuple[str, ...] = ()
    """Those that are known from the start."""


SPECS = (
    MetricSpec("vllm:num_requests_running", "gauge", "Requests in the running batch."),
    MetricSpec("vllm:num_requests_waiting", "gauge", "Requests that wait for a place in the batch."),
    MetricSpec("vllm:kv_cache_usage_perc", "gauge", "Share of the KV blocks that requests hold, 0 to 1."),
    MetricSpec("flashserve:model_bytes", "gauge", "What the engine takes beside its KV cache when it is ready."),
    MetricSpec("flashserve:kv_cache_bytes", "gauge", "The KV cache's size. On a CPU it takes memory as it fills."),
    MetricSpec("flashserve:engine_ready", "gauge", "1 while there is an engine process, else 0."),
    MetricSpec("flashserve:engine_stalled", "gauge", "1 while the engine has work and makes no step for 10 s, else 0."),
    MetricSpec("vllm:prompt_tokens_total", "counter", "Prompt tokens of requests that got their first token."),
    MetricSpec("vllm:generation_tokens_total", "counter", "Tokens generated."),
    MetricSpec("vllm:prefix_cache_queries_total", "counter", "Prompt tokens looked up in the prefix cache."),
    MetricSpec("vllm:prefix_cache_hits_total", "counter", "Prompt tokens found in the prefix cache."),
    MetricSpec("vllm:num_preemptions_total", "counter", "Preemptions by recomputation."),
    MetricSpec("flashserve:prefill_chunks_total", "counter", "Steps that computed a part of a prompt, not its end."),
    MetricSpec("flashserve:engine_steps_total", "counter", "Steps of the engine."),
    MetricSpec("flashserve:engine_restarts_total", "counter", "Engine processes started after one died."),
    MetricSpec("vllm:request_success_total", "counter", "Requests that ended by themselves.", "finished_reason",
               label_values=("stop", "length")),
    MetricSpec("flashserve:requests_cancelled_total", "counter", "Requests that were ended early.", "reason",
               label_values=("client", "deadline", "shutdown")),
    MetricSpec("flashserve:request_errors_total", "counter", "Requests answered with an error.", "code",
               label_values=(INVALID_ARG, UNAVAILABLE, INTERNAL)),
    MetricSpec("vllm:time_to_first_token_seconds", "histogram", "Arrival to first token.", None, LATENCY_BUCKETS),
    MetricSpec("vllm:inter_token_latency_seconds", "histogram", "Between tokens.", None, TOKEN_TIME_BUCKETS),
    # vLLM's older name of the same; its Triton backend exports this one.
    MetricSpec("vllm:time_per_output_token_seconds", "histogram", "Between tokens.", None, TOKEN_TIME_BUCKETS),
    MetricSpec(
        "vllm:request_time_per_output_token_seconds", "histogram", "Mean time per token after the first, by request.",
        None, TOKEN_TIME_BUCKETS,
    ),
    MetricSpec("vllm:e2e_request_latency_seconds", "histogram", "Arrival to end.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_queue_time_seconds", "histogram", "Arrival to first step.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_prefill_time_seconds", "histogram", "First step to first token.", None,
               REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_decode_time_seconds", "histogram", "First to last token.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_prompt_tokens", "histogram", "Prompt tokens by request.", None, TOKEN_COUNT_BUCKETS),
    MetricSpec("vllm:request_generation_tokens", "histogram", "Generated tokens by request.", None,
               TOKEN_COUNT_BUCKETS),
    MetricSpec("vllm:request_params_n", "histogram", "Samples asked for by request.", None, (1, 2, 5, 10, 20)),
)  # fmt: skip
BY_NAME = {spec.name: spec for spec in SPECS}


@dataclass(frozen=True)
class InfoSpec:
    """A gauge that is always 1 and carries facts as labels."""

    name: str
    help: str
    labels: tuple[tuple[str, str], ...]


def engine_infos(block_size: int, num_blocks: int) -> tuple[InfoSpec, ...]:
    """What is known once the engine is ready. ``num_blocks`` are on the device, whichever that is."""
    cache = (("block_size", str(block_size)), ("num_gpu_blocks", str(num_blocks)))
    # Gateways that route by adapter read it before anything else: no adapters can be loaded yet.
    adapters = (("max_lora", "0"), ("running_lora_adapters", ""), ("waiting_lora_adapters", ""))
    return (
        InfoSpec("vllm:cache_config_info", "The KV cache's shape.", cache),
        InfoSpec("vllm:lora_requests_info", "LoRA adapters that requests use.", adapters),
    )


Series = tuple[str, tuple[tuple[str, str], ...]]
"""A family's name on the wire, and the labels beyond those of the model."""


class Metrics:
    """Values of one model's metrics. Any thread may write; the ``take_…`` methods are the exporter's."""

    def __init__(self) -> None:
        self.hurry = threading.Event()
        """Set at the end of a request: whoever gets its answer may look at its counters at once."""
        self._lock = threading.Lock()
        self._gauges: dict[Series, float] = {}
        self._increments: dict[Series, float] = {}
        self._observations: dict[str, list[tuple[int, float]]] = {}

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[(name, ())] = value

    def add(self, name: str, amount: float = 1, label_value: str | None = None) -> None:
        """Increase a counter; ``label_value`` is for the one label of its spec."""
        label = BY_NAME[name].label
        series = (name, ((label, label_value),)) if label and label_value is not None else (name, ())
        with self._lock:
            self._increments[series] = self._increments.get(series, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add one observation to a histogram."""
        self.observe_all(name, (value,))

    def observe_all(self, name: str, values: Sequence[float]) -> None:
        """Add observations to a histogram: a step's worth at once, for 0.2 µs each."""
        buckets = BY_NAME[name].buckets
        with self._lock:
            found = self._observations.setdefault(name, [(0, 0.0)] * (len(buckets) + 1))
            for value in values:
                index = bisect.bisect_left(buckets, value)
                count, amount = found[index]
                found[index] = (count + 1, amount + value)

    def take_gauges(self) -> dict[Series, float]:
        """Gauges set since the last call."""
        with self._lock:
            gauges, self._gauges = self._gauges, {}
        return gauges

    def take_increments(self) -> dict[Series, float]:
        """What counters gained since the last call."""
        with self._lock:
            increments, self._increments = self._increments, {}
        return increments

    def take_observations(self) -> dict[str, list[tuple[int, float]]]:
        """What histograms gained since the last call: for each bucket the number of values and their sum."""
        with self._lock:
            observations, self._observations = self._observations, {}
        return observations


def sample(bounds: Sequence[float], found: Sequence[tuple[int, float]], limit: int) -> list[float]:
    """At most about ``limit`` values with the distribution that was found: each bucket's mean, by its share."""
    total = sum(count for count, _ in found)
    share = min(1.0, limit / total) if total else 0.0
    values: list[float] = []
    for bound, (count, amount) in zip((*bounds, float("inf")), found, strict=True):
        if count:
            mean = min(bound, amount / count)  # rounding must not push three times 0.1 over 0.1
            values += [mean] * max(1, round(count * share))
    return values


class TritonExporter:
    """Passes changes on to Triton. Used by one thread. Holds families and metrics: dropped ones would vanish.

    No two processes may hold series of the same labels. Triton 2.51 hands the second one the first one's series, and
    when the first ends, frees it under the second: its next increment then wrote into freed memory, and a reload later
    tritonserver crashed or hung. Hence :meth:`declare`, to be called when the predecessor has gone.
    """

    def __init__(self, metrics: Metrics, pb_utils: Any, labels: dict[str, str]) -> None:
        self._metrics = metrics
        self._pb = pb_utils
        self._labels = labels
        self._families: dict[str, Any] = {}
        self._series: dict[Series, Any] = {}
        self._sent_gauges: dict[Series, float] = {}

    def declare(self, infos: Sequence[InfoSpec]) -> None:
        """Create every series that is known from the start, and those of ``infos``, which never change."""
        for spec in SPECS:
            self._declare(spec)
        for info in infos:
            self._families[info.name] = self._pb.MetricFamily(
                name=info.name, description=info.help, kind=self._pb.MetricFamily.GAUGE
            )
            self._metric((info.name, info.labels)).set(1)

    def flush_gauges(self) -> None:
        for series, value in self._metrics.take_gauges().items():
            if self._sent_gauges.get(series) != value:
                self._metric(series).set(value)
                self._sent_gauges[series] = value

    def flush_counters(self) -> None:
        """Counters and histograms."""
        for series, amount in self._metrics.take_increments().items():
            self._metric(series).increment(amount)
        for name, found in self._metrics.take_observations().items():
            histogram = self._metric((name, ()))
            for value in sample(BY_NAME[name].buckets, found, OBSERVATIONS_PER_FLUSH):
                histogram.observe(value)

    def close(self) -> None:
        """Take all series out of Triton. Before the stub ends: the end of its interpreter would crash on them."""
        self._series.clear()
        self._families.clear()

    def _declare(self, spec: MetricSpec) -> None:
        """Create the series at 0, so that a first increase is visible to ``rate()``."""
        if spec.label is None:
            self._metric((spec.name, ()))
        else:
            for value in spec.label_values:
                self._metric((spec.name, ((spec.label, value),)))

    def _metric(self, series: Series) -> Any:
        metric = self._series.get(series)
        if metric is None:
            name, extra = series
            spec, labels = BY_NAME.get(name), {**self._labels, **dict(extra)}
            buckets = {"buckets": list(map(float, spec.buckets))} if spec is not None and spec.buckets else {}
            metric = self._family(name).Metric(labels=labels, **buckets)
            self._series[series] = metric
        return metric

    def _family(self, name: str) -> Any:
        family = self._families.get(name)
        if family is None:
            spec, kinds = BY_NAME[name], self._pb.MetricFamily
            kind = {"gauge": kinds.GAUGE, "counter": kinds.COUNTER, "histogram": kinds.HISTOGRAM}[spec.kind]
            family = kinds(name=name, description=spec.help, kind=kind)
            self._families[name] = family
        return family


class FlushBudget:
    """When counters may be passed on: as long as that takes a small share of the time, else once in a period."""

    def __init__(self, now: float) -> None:
        self._credit_s = FLUSH_CREDIT_S
        self._asked = self._due = now

    def allows(self, now: float) -> bool:
        """Whether a flush may start."""
        self._credit_s = min(FLUSH_CREDIT_S, self._credit_s + FLUSH_SHARE * (now - self._asked))
        self._asked = now
        return self._credit_s > 0 or now >= self._due

    def spend(self, started: float, seconds: float) -> None:
        """A flush took so long. Those that were due are no debt: hours of load would delay counters for hours."""
        self._credit_s = max(0.0, self._credit_s) - seconds
        self._due = started + COUNTER_PERIOD_S


class MetricsExportThread:
    """Owns the exporter's thread: gauges and counters soon after they change, under load within a second."""

    def __init__(
        self,
        exporter: TritonExporter,
        hurry: threading.Event,
        infos: Sequence[InfoSpec],
        has_predecessor: Callable[[], bool],
        server_lives: Callable[[], bool],
    ) -> None:
        self._exporter = exporter
        self._hurry = hurry
        self._infos = infos
        self._has_predecessor = has_predecessor
        self._server_lives = server_lives
        self._declared = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """The series are there when this returns, unless those of a predecessor still are."""
        self._declare_when_alone()
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._hurry.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_TIMEOUT_S)
        self._exporter.close()

    def _run(self) -> None:
        next_gauges, budget = 0.0, FlushBudget(time.monotonic())
        # Nobody answers for a dead tritonserver: the call would hold the interpreter's lock for ever.
        while not self._stopping and self._server_lives():
            now = time.monotonic()
            try:
                if now >= next_gauges:
                    next_gauges = now + (GAUGE_PERIOD_S if self._declared else DECLARE_PERIOD_S)
                    self._declare_when_alone()
                    if self._declared:
                        self._exporter.flush_gauges()
                if self._declared and budget.allows(now):
                    self._exporter.flush_counters()
                    budget.spend(now, time.monotonic() - now)
            except Exception:
                log.exception("metrics could not be exported")
            self._hurry.wait(max(0.0, next_gauges - time.monotonic()))
            self._hurry.clear()

    def _declare_when_alone(self) -> None:
        if not self._declared and not self._has_predecessor():
            self._exporter.declare(self._infos)
            self._declared = True
