"""What benchmarks/batching makes of its figures, without a model and without torch."""

from __future__ import annotations

import pytest

from benchmarks.batching import analysis
from benchmarks.batching.grid import Grid
from benchmarks.batching.load import Mixed, Point
from benchmarks.batching.report import Findings, as_json, as_markdown
from benchmarks.batching.workload import OURS, SERVED, SYSTEMS, mixed_lengths
from benchmarks.common.engines import ENGINES, NAIVE, STATIC
from benchmarks.common.protocol import Requests, Run


def test_static_batches_waste_what_the_longest_row_has_more_than_the_others():
    rows = analysis.static_rows([[10, 4], [6, 6]], batch=2)
    assert (rows.useful, rows.computed, rows.room) == (26, 32, 32)
    assert rows.wasted == pytest.approx(6 / 32) and rows.busy == pytest.approx(26 / 32)


def test_places_that_no_request_took_are_not_busy_and_not_computed():
    rows = analysis.static_rows([[8, 8, 8]], batch=4)
    assert rows.wasted == 0 and rows.busy == pytest.approx(0.75)


def test_requests_that_began_together_are_a_batch():
    assert sorted(map(sorted, analysis.in_groups([5, 7, 9], [0.0, 2.5, 0.0]))) == [[5, 9], [7]]


def test_static_steps_follow_the_longest_request_of_each_batch():
    steps = analysis.static_steps([3, 5, 2], batch=2)
    assert steps == {"first": [0, 0, 5], "last": [5, 5, 7], "slots": [0, 1, 0]}


def test_no_two_requests_share_a_place_at_once():
    assert analysis.slots_of([0, 0, 3, 5], [5, 3, 9, 6]) == [0, 1, 1, 0]


def test_paged_memory_is_compared_with_reservations_for_the_same_requests():
    # Two requests over one step: 20 and 30 tokens, in 2 + 2 blocks of 16.
    details = {"kv_used": 50, "kv_allocated": 64, "running": 2}
    shares = analysis.kv_shares(details, longest=100, context=500)
    assert list(shares.values()) == pytest.approx([50 / 64, 50 / 200, 50 / 1000])


def test_latency_counts_from_the_arrival():
    work = Requests([[1], [1]], [10, 10], [0.0, 1.0])
    found = analysis.latencies(work, Run(4.0, [10, 10], starts=[0.0, 2.0], firsts=[0.5, 2.5], ends=[2.0, 4.0]))
    assert found["latency_p50_s"] == pytest.approx(2.5) and found["ttft_p50_ms"] == pytest.approx(1000)
    assert found["normalised_p95_ms"] == pytest.approx(295)


def test_a_cell_of_the_grid_stands_on_the_smallest_measurement_that_has_its_rate():
    grid = Grid([8, 128], [1, 4, 16], [32], 128)
    assert grid.measured(STATIC, 128, 4, 32) == (STATIC, 4, 4, 32)
    assert grid.measured(SERVED, 128, 4, 32) == (SERVED, 8, 4, 32)
    # Fewer requests than the batch are a smaller batch, and a batch of one is one by one.
    assert grid.measured(SERVED, 8, 16, 32) == (SERVED, 8, 8, 32)
    assert grid.measured(STATIC, 128, 1, 32) == (NAIVE, 2, 1, 32)
    assert grid.measured(SERVED, 128, 1, 32) == (SERVED, 2, 1, 32)


def test_speedups_are_over_one_by_one():
    grid = Grid([8], [4], [32], 128, {(NAIVE, 2, 1, 32): [10.0, 12.0, 11.0], (SERVED, 8, 4, 32): [110.0]})
    assert grid.speedup(SERVED, 8, 4, 32) == pytest.approx(10)


def test_workloads_are_the_same_each_time():
    assert Requests.equal(3, 5, 7, 100) == Requests.equal(3, 5, 7, 100)
    work = mixed_lengths(50, 2.0, 1000)
    assert work == mixed_lengths(50, 2.0, 1000) and work.arrivals == sorted(work.arrivals)
    assert all(16 <= len(prompt) <= 256 for prompt in work.prompts) and all(8 <= n <= 128 for n in work.outputs)
    assert mixed_lengths(5, None, 1000).arrivals == [0.0] * 5


def test_a_system_keeps_up_while_it_begins_about_as_many_requests_as_arrive():
    assert Point(SERVED, 4.0, 40, 3.6, 100.0, {}).keeps_up
    assert not Point(SERVED, 4.0, 40, 3.0, 100.0, {}).keeps_up


def test_the_report_has_every_system_and_part():
    latency = dict.fromkeys(("normalised_p50_ms", "normalised_p95_ms", "ttft_p50_ms", "ttft_p95_ms"), 12.0)
    found = Findings("a-shape", {"cpu": "A CPU", "cores": 2, "memory_gib": 8.0}, {}, Grid([4, 8], [1, 4], [8], 16))
    found.ceilings = {"read_gb_s": 20.0, "gemm_tflop_s": 1.0}
    found.grid.rates = {key: [10.0 * key[2]] for key in found.grid.measurements()}
    kv = analysis.kv_shares({"kv_used": 50, "kv_allocated": 64, "running": 2}, longest=100, context=500)
    measured = {"tokens_per_s": 30.0, "wasted": 0.25, "busy": 0.5, "latency_p50_s": 1.0, "latency_p95_s": 2.0}
    ours = {**measured, "kv": kv, "kv_lost_tokens": 7.5, "block_size": 16}
    found.mixed = Mixed(mixed_lengths(4, None, 1000), 2, 500, {NAIVE: measured, STATIC: measured, OURS: ours})
    found.points = [Point(SERVED, 4.0, 40, 3.6, 100.0, latency), Point(STATIC, 4.0, 40, 1.0, 20.0, latency)]
    text = as_markdown(found)
    for system in SYSTEMS:
        assert text.count(ENGINES[system].title) >= 1
    for words in ("40.0 (4.0×)", "78.1%", "7.5 tokens per request", "4 (too much)", "4 requests of mixed lengths"):
        assert words in text
    assert len(as_json(found)["grid"]["measured"]) == len(found.grid.measurements())
