"""The metrics' arithmetic; that Triton shows them is a server test."""

import time
from typing import ClassVar

import pytest

from flashserve.frontend.metrics import BY_NAME, SPECS, Metrics, MetricsExportThread, TritonExporter, engine_infos

TTFT = "vllm:time_to_first_token_seconds"


class RecordingMetric:
    def __init__(self):
        self.value = 0.0
        self.operations = 0

    def set(self, value):
        self.value = value
        self.operations += 1

    def increment(self, amount):
        assert amount >= 0, "Triton refuses a counter that falls"
        self.value += amount
        self.operations += 1


class RecordingFamily:
    """Stands in for the C++ class, which exists only inside a stub."""

    COUNTER, GAUGE = "counter", "gauge"
    made: ClassVar[dict] = {}

    def __init__(self, name, description, kind):
        self.name, self.kind = name, kind

    def Metric(self, labels):  # noqa: N802 - Triton's name
        return RecordingFamily.made.setdefault((self.name, tuple(sorted(labels.items()))), RecordingMetric())


class PbUtils:
    MetricFamily = RecordingFamily


@pytest.fixture
def exported():
    RecordingFamily.made = {}
    metrics = Metrics()
    exporter = TritonExporter(metrics, PbUtils, {"model": "m"})
    exporter.declare(engine_infos(16, 100))
    return metrics, exporter, RecordingFamily.made


def value(made, name, **labels):
    return made[(name, tuple(sorted({"model": "m", **labels}.items())))].value


def test_counters_add_up_over_flushes(exported):
    metrics, exporter, made = exported
    for amount in (2, 3):
        metrics.add("vllm:generation_tokens_total", amount)
        exporter.flush_counters()
    exporter.flush_counters()
    assert value(made, "vllm:generation_tokens_total") == 5


def test_a_labelled_counter_has_one_series_per_label_value(exported):
    metrics, exporter, made = exported
    metrics.add("vllm:request_success_total", label_value="stop")
    metrics.add("vllm:request_success_total", 2, label_value="length")
    exporter.flush_counters()
    assert value(made, "vllm:request_success_total", finished_reason="stop") == 1
    assert value(made, "vllm:request_success_total", finished_reason="length") == 2


def test_histogram_buckets_are_cumulative_and_inclusive(exported):
    metrics, exporter, made = exported
    metrics.observe_all(TTFT, [0.001, 0.0011, 0.5, 99.0])
    exporter.flush_counters()
    assert value(made, f"{TTFT}_bucket", le="0.001") == 1
    assert value(made, f"{TTFT}_bucket", le="0.005") == 2
    assert value(made, f"{TTFT}_bucket", le="0.25") == 2
    assert value(made, f"{TTFT}_bucket", le="0.5") == 3
    assert value(made, f"{TTFT}_bucket", le="30.0") == 3
    assert value(made, f"{TTFT}_bucket", le="+Inf") == 4
    assert value(made, f"{TTFT}_count") == 4
    assert value(made, f"{TTFT}_sum") == pytest.approx(99.5021)


def test_every_series_without_a_label_exists_from_the_start(exported):
    _, _, made = exported
    names = {name for name, _ in made}
    for spec in SPECS:
        if spec.label is None:
            assert (f"{spec.name}_count" if spec.kind == "histogram" else spec.name) in names


def test_a_gauge_is_sent_only_when_it_changes(exported):
    metrics, exporter, made = exported
    for running in (1, 2, 2, 2):
        metrics.set("vllm:num_requests_running", running)
        exporter.flush_gauges()
    gauge = made[("vllm:num_requests_running", (("model", "m"),))]
    assert (gauge.value, gauge.operations) == (2, 2)


def test_nothing_is_declared_beside_a_predecessor(exported):
    """Triton frees the series of the one that ends first, whoever else holds them."""
    predecessors = [True, True, False]
    RecordingFamily.made = {}
    metrics = Metrics()
    exporter = TritonExporter(metrics, PbUtils, {"model": "m"})
    thread = MetricsExportThread(exporter, engine_infos(16, 100), lambda: predecessors.pop(0), lambda: True)
    metrics.add("vllm:generation_tokens_total", 3)
    thread.start()
    assert not RecordingFamily.made
    try:
        deadline = time.monotonic() + 10
        while not RecordingFamily.made.values() or not value(RecordingFamily.made, "vllm:generation_tokens_total"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        thread.stop()
    assert not predecessors
    assert value(RecordingFamily.made, "vllm:cache_config_info", block_size="16", num_gpu_blocks="100") == 1


def test_names_are_unique_and_buckets_rise():
    assert len(BY_NAME) == len(SPECS)
    for spec in SPECS:
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert bool(spec.buckets) == (spec.kind == "histogram")
