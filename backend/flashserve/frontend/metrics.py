"""Metrics under vLLM's names, collected here and passed on to Triton's own /metrics in batches.

One metric operation of the Python backend is a round trip to tritonserver: 90-180 µs, measured. At thousands of
tokens per second nothing may cost that per token. So values are kept in plain Python and a thread passes on what
changed. Triton's histogram type can only observe one value per round trip; a histogram is therefore exported as
what it is on the wire, counters named ``…_bucket{le}``, ``…_sum`` and ``…_count``, which Prometheus' functions
(``histogram_quantile``, ``rate``) read like any other histogram.
"""

from __future__ import annotations

import bisect
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flashserve.errors import INTERNAL, INVALID_ARG, UNAVAILABLE

log = logging.getLogger(__name__)

GAUGE_PERIOD_S = 0.05  # one gauge changes with each step, three at most: 20-60 round trips per second
COUNTER_TICKS = 20  # counters every second: up to 100 series change under load, 1-2% of a core
DECLARE_TICKS = 5  # every 0.25 s a look at the processes, until the predecessor has ended
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
    MetricSpec("flashserve:engine_ready", "gauge", "1 while the engine process answers, else 0."),
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
    MetricSpec(
        "vllm:time_per_output_token_seconds", "histogram", "Mean time per token after the first, by request.", None,
        TOKEN_TIME_BUCKETS,
    ),
    MetricSpec("vllm:e2e_request_latency_seconds", "histogram", "Arrival to end.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_queue_time_seconds", "histogram", "Arrival to first step.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_prefill_time_seconds", "histogram", "First step to first token.", None,
               REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_decode_time_seconds", "histogram", "First to last token.", None, REQUEST_TIME_BUCKETS),
    MetricSpec("vllm:request_prompt_tokens", "histogram", "Prompt tokens by request.", None, TOKEN_COUNT_BUCKETS),
    MetricSpec("vllm:request_generation_tokens", "histogram", "Generated tokens by request.", None,
               TOKEN_COUNT_BUCKETS),
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
    """Values of one model's metrics. Any thread may write; :meth:`take_changes` is the exporter's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gauges: dict[Series, float] = {}
        self._increments: dict[Series, float] = {}
        self._bucket_counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

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
            counts = self._bucket_counts.setdefault(name, [0] * (len(buckets) + 1))
            for value in values:
                counts[bisect.bisect_left(buckets, value)] += 1
            self._sums[name] = self._sums.get(name, 0.0) + sum(values)

    def take_gauges(self) -> dict[Series, float]:
        """Gauges set since the last call."""
        with self._lock:
            gauges, self._gauges = self._gauges, {}
        return gauges

    def take_increments(self) -> dict[Series, float]:
        """What counters gained since the last call, histograms' counters included."""
        with self._lock:
            increments, self._increments = self._increments, {}
            bucket_counts, self._bucket_counts = self._bucket_counts, {}
            sums, self._sums = self._sums, {}
        for name, counts in bucket_counts.items():
            cumulative = 0
            for bound, count in zip((*BY_NAME[name].buckets, float("inf")), counts, strict=True):
                cumulative += count
                if cumulative:
                    increments[(f"{name}_bucket", (("le", _format_bound(bound)),))] = cumulative
            increments[(f"{name}_count", ())] = cumulative
            increments[(f"{name}_sum", ())] = sums[name]
        return increments


def _format_bound(bound: float) -> str:
    return "+Inf" if bound == float("inf") else str(float(bound))


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
        for series, amount in self._metrics.take_increments().items():
            self._metric(series).increment(amount)

    def close(self) -> None:
        """Take all series out of Triton. Before the stub ends: the end of its interpreter would crash on them."""
        self._series.clear()
        self._families.clear()

    def _declare(self, spec: MetricSpec) -> None:
        """Create the series at 0, so that a first increase is visible to ``rate()``."""
        if spec.kind == "histogram":
            for bound in (*spec.buckets, float("inf")):
                self._metric((f"{spec.name}_bucket", (("le", _format_bound(bound)),)))
            self._metric((f"{spec.name}_count", ()))
            self._metric((f"{spec.name}_sum", ()))
        elif spec.label is None:
            self._metric((spec.name, ()))
        else:
            for value in spec.label_values:
                self._metric((spec.name, ((spec.label, value),)))

    def _metric(self, series: Series) -> Any:
        metric = self._series.get(series)
        if metric is None:
            name, extra = series
            metric = self._family(name).Metric(labels={**self._labels, **dict(extra)})
            self._series[series] = metric
        return metric

    def _family(self, name: str) -> Any:
        family = self._families.get(name)
        if family is None:
            spec = BY_NAME.get(name) or BY_NAME[name.rpartition("_")[0]]
            kinds = self._pb.MetricFamily
            kind = kinds.GAUGE if spec.kind == "gauge" else kinds.COUNTER
            family = kinds(name=name, description=spec.help, kind=kind)
            self._families[name] = family
        return family


class MetricsExportThread:
    """Owns the exporter's thread: gauges soon after they change, counters every second."""

    def __init__(
        self,
        exporter: TritonExporter,
        infos: Sequence[InfoSpec],
        has_predecessor: Callable[[], bool],
        server_lives: Callable[[], bool],
    ) -> None:
        self._exporter = exporter
        self._infos = infos
        self._has_predecessor = has_predecessor
        self._server_lives = server_lives
        self._declared = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """The series are there when this returns, unless those of a predecessor still are."""
        self._declare_when_alone()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)
        self._exporter.close()

    def _run(self) -> None:
        ticks = 0
        # Nobody answers for a dead tritonserver: the call would hold the interpreter's lock for ever.
        while not self._stopping.wait(GAUGE_PERIOD_S) and self._server_lives():
            ticks += 1
            try:
                if ticks % DECLARE_TICKS == 0:
                    self._declare_when_alone()
                if self._declared:
                    self._exporter.flush_gauges()
                    if ticks % COUNTER_TICKS == 0:
                        self._exporter.flush_counters()
            except Exception:
                log.exception("metrics could not be exported")

    def _declare_when_alone(self) -> None:
        if not self._declared and not self._has_predecessor():
            self._exporter.declare(self._infos)
            self._declared = True
