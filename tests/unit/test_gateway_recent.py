"""The last requests over time, and the static batches that they are compared with."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve_client import Timings
from flashserve_gateway.recent import Bar, RecentRequests, Span, peak, static_batches
from gateway_peers import MemoryTransport, gate, says


def span(queued: float, prefill: float = 1, decode: float = 1, waits: float = 0) -> Span:
    start = queued + waits
    return Span(queued, start, start + prefill, start + prefill + decode, start + prefill + decode, 1)


def times(spans: list[Span]) -> list[tuple[float, ...]]:
    return [(span.start, span.first, span.last, span.end) for span in spans]


def test_a_static_batch_ends_with_its_longest_answer():
    assert times(static_batches([span(0, 1, 2), span(0, 3, 8)], 2)) == [(0, 3, 5, 11), (0, 3, 11, 11)]


def test_who_comes_while_a_static_batch_runs_waits_for_its_end():
    long, late = span(0, 1, 9), span(2, 1, 1)
    assert times(static_batches([late, long], 2)) == [(0, 1, 10, 10), (10, 11, 12, 12)]


def test_a_static_batch_waits_a_little_for_those_that_come_nearly_together():
    asked = [span(0), span(0.3), span(0.6)]
    assert [found.start for found in static_batches(asked, 3, gather_s=0.5)] == [0.3, 0.3, 2.3]
    assert [found.start for found in static_batches(asked[:1], 3, gather_s=0.5)] == [0]  # nor for one who does not come


def test_a_full_static_batch_leaves_the_rest_for_the_next():
    assert [found.start for found in static_batches([span(0), span(0), span(0)], 2)] == [0, 0, 2]


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch of 0"):
        static_batches([], 0)
    assert static_batches([], 1) == []


def test_the_peak_counts_those_that_run_and_not_those_that_wait():
    assert peak([]) == 1
    assert peak([span(0, 1, 1), span(0, 1, 1, waits=2), span(1, 1, 1)]) == 2


SPANS = st.lists(st.builds(span, *(st.integers(0, 50) for _ in range(4))), max_size=30)


@given(SPANS, st.integers(1, 5), st.integers(0, 5))
def test_static_batches_do_the_same_work_one_batch_after_the_other(spans: list[Span], size: int, gather_s: int):
    found = static_batches(spans, size, gather_s)
    asked = sorted(spans, key=lambda span: span.queued)
    assert [span.queued for span in found] == [span.queued for span in asked]
    assert [span.last - span.first for span in found] == [span.last - span.first for span in asked]
    assert all(span.queued <= span.start <= span.first <= span.last <= span.end for span in found)
    batches: list[list[Span]] = []
    for member in found:
        if batches and len(batches[-1]) < size and (batches[-1][0].start, batches[-1][0].end) == (
            member.start, member.end,
        ):  # fmt: skip
            batches[-1].append(member)
        else:
            batches.append([member])
    for one, following in itertools.pairwise(batches):
        assert following[0].start >= one[0].end
        assert len({(span.start, span.first, span.end) for span in one}) == 1


def test_a_bar_learns_from_the_engine_when_it_began():
    bar = Bar("demo", queued=10.0)
    assert bar.span(11.0) == Span(10, 11, 11, 11, 11, 0)  # it waits, as far as anybody knows
    bar.first = 12.0
    assert bar.span(13.0) == Span(10, 10, 12, 13, 13, 0)
    bar.end(Timings(queue_ms=1500, prefill_ms=500, decode_ms=7))
    assert bar.ended is not None
    assert bar.span(0.0) == Span(10, 11.5, 12, bar.ended, bar.ended, 0)


def test_the_ring_is_bounded_and_forgets_what_is_old():
    recent = RecentRequests(kept=3)
    for _ in range(5):
        recent.begin("demo").end(None)
    everything = lambda model: True  # noqa: E731
    assert len(recent.pictures(everything)["demo"]["continuous"]) == 3
    assert recent.pictures(lambda model: False) == {}
    now = Bar("demo").queued
    assert recent.pictures(everything, now + 3600) == {}


async def test_the_page_gets_a_bar_for_each_request():
    async with gate(MemoryTransport(says("one ", "two "))) as gateway:
        await asyncio.gather(*(gateway.chat(stream=index % 2 == 0) for index in range(4)))
        (batch,) = (await gateway.http.get("/operations")).json()["batches"].values()
    assert 1 <= batch["size"] <= 4
    for rows in (batch["continuous"], batch["static"]):
        assert [row[5] for row in rows] == [2] * 4
        assert all(row[:5] == sorted(row[:5]) for row in rows)
