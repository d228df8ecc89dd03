"""What a load test measures: histograms, records, and how the figures of several processes become one."""

from __future__ import annotations

import json
import math
import random

import pytest

from loadtest.histogram import Histogram
from loadtest.record import CANCELLED, UNFINISHED, Record
from loadtest.statistics import Objectives, Schedule, Statistics


def record(planned: float = 0.0, times: tuple[float, ...] = (), tokens: int | None = 1, **values: object) -> Record:
    made = Record("triton-grpc", planned, planned, end=times[-1] if times else planned)
    for time_s in times:
        made.add_chunk(time_s, tokens, True)
    for name, value in values.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 0.999, 1.0])
def test_a_quantile_is_at_most_1_1_percent_off(share: float) -> None:
    rng = random.Random(1)
    values = sorted(rng.lognormvariate(-3, 2) for _ in range(20_000))
    exact = values[max(0, math.ceil(share * len(values)) - 1)]
    assert Histogram(values).quantile(share) == pytest.approx(exact, rel=0.0111)


def test_histograms_of_two_processes_merge_into_that_of_one() -> None:
    values = [random.Random(2).expovariate(10) for _ in range(1000)] + [0.0, 5.0]
    merged = Histogram(values[::2])
    merged.merge(Histogram.from_json(json.loads(json.dumps(Histogram(values[1::2]).to_json()))))
    one = Histogram(values)
    assert (merged.buckets, merged.count, merged.least, merged.greatest) == (one.buckets, one.count, 0.0, 5.0)
    assert merged.total == pytest.approx(one.total)


def test_an_empty_histogram_has_no_quantile_and_comes_back_empty() -> None:
    empty = Histogram.from_json(Histogram().to_json())
    assert empty.count == 0
    assert math.isnan(empty.quantile(0.5))
    assert math.isnan(empty.mean)


def test_ttft_counts_from_the_planned_arrival() -> None:
    late = Record("openai", planned=1.0, sent=1.4)
    late.add_chunk(1.5, None, has_text=False)  # the role chunk
    late.add_chunk(1.9, None, has_text=True)
    assert late.ttft == pytest.approx(0.9)


def test_empty_chunks_of_triton_are_not_tokens() -> None:
    made = Record("triton-http", 0.0, 0.0)
    made.add_chunk(0.1, 0, has_text=False)  # keep-alive
    made.add_chunk(0.2, 1, has_text=False)  # a token whose bytes are no character yet
    made.add_chunk(0.3, 0, has_text=True)
    assert made.chunks == [(0.2, 1)]


def test_tpot_is_per_output_token_and_not_per_chunk() -> None:
    made = record(0.0, (1.0, 1.2, 1.4), tokens=2, output_tokens=6)
    assert made.tpot == pytest.approx(0.4 / 5)
    assert [gap for gap, _ in made.gaps] == pytest.approx([0.2, 0.2])
    assert math.isnan(record(0.0, (1.0,), output_tokens=1).tpot)


def test_the_edges_and_the_warm_up_are_apart() -> None:
    schedule = Schedule(warmup_s=5, duration_s=100)
    at = {0: "warmup", 4.9: "warmup", 5: "edge", 14.9: "edge", 15: "steady", 94.9: "steady", 95: "edge", 104: "edge"}
    assert {time_s: schedule.phase(time_s) for time_s in at} == at


def test_gaps_are_counted_once_per_chunk_and_per_token_beside_it() -> None:
    statistics = Statistics()
    made = record(2.0, (2.1, 2.3), tokens=2, output_tokens=4, prompt_tokens=7)
    statistics.add(made, 0.0, Schedule(0, 10), Objectives())
    phase = statistics.phases["steady"]
    assert phase.measures["itl"].count == 1
    assert phase.measures["itl"].mean == pytest.approx(0.2)
    assert phase.measures["itl_per_token"].count == 2
    assert phase.measures["itl_per_token"].mean == pytest.approx(0.1)
    assert (phase.counts["prompt_tokens"], phase.counts["output_tokens"]) == (7, 4)
    assert statistics.seconds[2].counts["tokens"] == 4


def test_where_chunks_do_not_tell_their_tokens_the_usage_counts() -> None:
    statistics = Statistics()
    made = record(2.0, (2.1, 2.3, 3.2), tokens=None, output_tokens=6)
    statistics.add(made, 0.0, Schedule(0, 10), Objectives())
    assert statistics.phases["steady"].measures["itl_per_token"].count == 0
    assert [statistics.seconds[at].counts["tokens"] for at in (2, 3)] == [4, 2]


def test_a_request_cut_off_before_its_first_token_is_in_ttft_with_what_it_had_waited() -> None:
    statistics = Statistics()
    statistics.add(record(2.0, error=UNFINISHED, end=9.0), 0.0, Schedule(0, 10), Objectives())
    phase = statistics.phases["steady"]
    assert phase.measures["ttft"].greatest == 7.0
    assert phase.counts["failed"] == 1


def test_clients_that_leave_as_planned_are_no_failures() -> None:
    statistics = Statistics()
    statistics.add(record(2.0, (2.1,), error=CANCELLED), 0.0, Schedule(0, 10), Objectives())
    counts = statistics.phases["steady"].counts
    assert (counts["left"], counts["failed"], counts["finished"]) == (1, 0, 0)
    assert not statistics.messages


def test_goodput_counts_requests_that_meet_every_objective() -> None:
    objectives = Objectives(p99_ttft_s=0.5, p99_itl_s=0.1)
    assert objectives.met_by(record(0.0, (0.4, 0.45, 0.5), output_tokens=3))
    assert not objectives.met_by(record(0.0, (0.6, 0.65), output_tokens=2))
    assert not objectives.met_by(record(0.0, (0.4, 0.8), output_tokens=2))
    assert not objectives.met_by(record(0.0, (0.1,), output_tokens=1, error="timeout"))


def test_statistics_of_two_processes_merge_into_those_of_one_over_json() -> None:
    rng = random.Random(3)
    one, parts = Statistics(), (Statistics(), Statistics())
    for number in range(200):
        start = rng.uniform(0, 10)
        times = tuple(start + 0.1 * step for step in range(1, rng.randint(2, 9)))
        made = record(
            start, times, output_tokens=len(times), prompt_tokens=5, error="timeout" if number % 9 == 0 else None
        )
        for statistics in (one, parts[number % 2]):
            statistics.add(made, 0.0, Schedule(1, 9), Objectives())
    merged = Statistics()
    for part in parts:
        merged.merge(Statistics.from_json(json.loads(json.dumps(part.to_json()))))
    expected, found = one.to_json(), merged.to_json()
    for statistics in (expected, found):
        _without_sums(statistics)
    assert found == expected


def _without_sums(value: object) -> None:
    """Sums of floats depend on their order."""
    if isinstance(value, dict):
        value.pop("total", None)
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _without_sums(child)
