"""The metrics' arithmetic; that Triton shows them is a server test."""

import itertools
import time
from typing import ClassVar

import pytest

from flashserve.frontend.metrics import (
    BY_NAME,
    OBSERVATIONS_PER_FLUSH,
    SPECS,
    FlushBudget,
    Metrics,
    MetricsExportThread,
    TritonExporter,
    engine_infos,
)

TTFT = "vllm:time_to_first_token_seconds"


class RecordingMetric:
    def __init__(self, buckets=()):
        self.value = 0.0
        self.operations = 0
        self.observed = []
        self.buckets = buckets

    def set(self, value):
        self.value = value
        self.operations += 1

    def observe(self, value):
        self.observed.append(value)
        self.operations += 1

    def increment(self, amount):
        assert amount >= 0, "Triton refuses a counter that falls"
        self.value += amount
        self.operations += 1


class RecordingFamily:
    """Stands in for the C++ class, which exists only inside a stub."""

    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
    made: ClassVar[dict] = {}

    def __init__(self, name, description, kind):
        self.name, self.kind = name, kind

    def Metric(self, labels, buckets=()):  # noqa: N802 - Triton's name
        assert bool(buckets) == (self.kind == self.HISTOGRAM)
        return RecordingFamily.made.setdefault((self.name, tuple(sorted(labels.items()))), RecordingMetric(buckets))


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


def observed(made, name):
    return made[(name, (("model", "m"),))].observed


def test_a_histogram_gets_a_value_for_each_in_its_bucket_with_their_sum(exported):
    metrics, exporter, made = exported
    metrics.observe_all(TTFT, [0.001, 0.0011, 0.0013, 0.5, 99.0])
    exporter.flush_counters()
    exporter.flush_counters()
    assert observed(made, TTFT) == pytest.approx([0.001, 0.0012, 0.0012, 0.5, 99.0])
    assert made[(TTFT, (("model", "m"),))].buckets == list(BY_NAME[TTFT].buckets)


def test_of_many_values_a_flush_passes_on_a_sample_with_their_distribution(exported):
    metrics, exporter, made = exported
    metrics.observe_all(TTFT, [0.003] * 30_000 + [0.3] * 9_990 + [20.0] * 10)
    exporter.flush_counters()
    values = observed(made, TTFT)
    assert len(values) == OBSERVATIONS_PER_FLUSH + 1  # the rarest is never left out
    assert [values.count(value) for value in sorted(set(values))] == [750, 250, 1]
    assert sorted(set(values)) == pytest.approx([0.003, 0.3, 20.0])


def test_a_value_on_a_buckets_bound_stays_in_it(exported):
    metrics, exporter, made = exported
    metrics.observe_all(TTFT, [0.1] * 3)  # (0.1 + 0.1 + 0.1) / 3 > 0.1
    exporter.flush_counters()
    assert observed(made, TTFT) == [0.1] * 3


def test_every_series_without_a_label_exists_from_the_start(exported):
    _, _, made = exported
    names = {name for name, _ in made}
    for spec in SPECS:
        if spec.label is None:
            assert spec.name in names


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
    thread = MetricsExportThread(
        exporter, metrics.hurry, engine_infos(16, 100), lambda: predecessors.pop(0), lambda: True
    )
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


@pytest.fixture
def export_thread(exported):
    metrics, exporter, _ = exported
    thread = MetricsExportThread(exporter, metrics.hurry, engine_infos(16, 100), lambda: False, lambda: True)
    yield thread
    thread.stop()


def eventually(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_counters_come_at_once_while_they_cost_little(exported, export_thread, monkeypatch):
    monkeypatch.setattr("flashserve.frontend.metrics.COUNTER_PERIOD_S", 1000)
    metrics, _, made = exported
    export_thread.start()
    for i in range(1, 21):
        metrics.add("vllm:generation_tokens_total")
        metrics.hurry.set()
        eventually(lambda total=i: value(made, "vllm:generation_tokens_total") == total)


def test_costly_counters_come_once_in_their_period(exported, export_thread, monkeypatch):
    """A flush that takes all that was saved up is followed by none before the period's end."""
    metrics, exporter, _ = exported
    flushes = []
    monkeypatch.setattr("flashserve.frontend.metrics.FLUSH_CREDIT_S", 0.005)
    monkeypatch.setattr("flashserve.frontend.metrics.COUNTER_PERIOD_S", 0.2)

    def slow_flush():
        flushes.append(time.monotonic())
        time.sleep(0.1)

    monkeypatch.setattr(exporter, "flush_counters", slow_flush)
    export_thread.start()

    def hurry_until_four():
        metrics.hurry.set()
        return len(flushes) >= 4

    eventually(hurry_until_four)
    # Both ends of a period are read a moment after the thread read its own clock; without a period it were 0.1 s.
    assert all(later - sooner > 0.15 for sooner, later in itertools.pairwise(flushes))


def test_hours_of_costly_counters_delay_later_ones_by_seconds_only():
    budget, end_of_load = FlushBudget(0.0), 3 * 3600
    for now in range(end_of_load + 20):
        assert budget.allows(now), "at the latest once in a second"
        budget.spend(now, 0.3 if now < end_of_load else 0.001)
    assert budget.allows(now + 0.05), "again as soon as a request ends"


def test_names_are_unique_and_buckets_rise():
    assert len(BY_NAME) == len(SPECS)
    for spec in SPECS:
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert bool(spec.buckets) == (spec.kind == "histogram")
