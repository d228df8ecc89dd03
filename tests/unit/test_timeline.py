"""The trace of an engine's steps and requests, as a viewer reads it."""

import json

import pytest

from flashserve.engine.timeline import Timeline
from flashserve.protocol import RequestTimings, Stats, TokenOutput
from flashserve.scheduling.output import ScheduledRow, SchedulerOutput

STATS = Stats(running=2, waiting=3, free_blocks=6, total_blocks=10, steps=7, prompt_tokens=0, generation_tokens=0,
              prefix_cache_queries=0, prefix_cache_hits=0, preemptions=0, prefill_chunks=0)  # fmt: skip


def plan(*sizes):
    rows = [ScheduledRow(i, i, 0, size, [], [], 1) for i, size in enumerate(sizes)]
    return SchedulerOutput(1, [], rows, sum(sizes), [])


def events(timeline, path, **wanted):
    timeline.write(path)
    found = json.loads(path.read_text())["traceEvents"]
    return [event for event in found if wanted.items() <= event.items()]


def ended(request_id=5, reason="length", scheduled=11.0, first=12.0, last=14.0):
    return TokenOutput(request_id, [1], reason, RequestTimings(10.0, scheduled, first, last, 32, 1))


def test_a_step_is_a_slice_with_its_size_and_what_was_there(tmp_path):
    timeline = Timeline()
    timeline.add_step(plan(1, 1, 30), 100.0, 100.25, STATS)
    (step,) = events(timeline, tmp_path / "t", ph="X")
    assert (step["ts"], step["dur"]) == (100e6, 0.25e6)
    assert step["args"] == {"step": 7, "rows": 3, "tokens": 32}
    assert [event["args"] for event in events(timeline, tmp_path / "t", ph="C")] == [
        {"running": 2, "waiting": 3},
        {"held": 4},
    ]


def test_steps_that_overlap_are_shown_one_after_the_other(tmp_path):
    timeline = Timeline()
    for started, end in ((1.0, 3.0), (2.0, 4.0)):
        timeline.add_step(plan(1), started, end, STATS)
    assert [(s["ts"], s["dur"]) for s in events(timeline, tmp_path / "t", ph="X")] == [(1e6, 2e6), (3e6, 1e6)]


def spans(timeline, path):
    begins, ends = ({(e["id"], e["name"]): e["ts"] / 1e6 for e in events(timeline, path, ph=ph)} for ph in "be")
    assert begins.keys() == ends.keys()
    return {name: (begins[key], ends[key]) for key in begins for _, name in [key]}


def test_a_requests_spans_meet(tmp_path):
    timeline = Timeline()
    timeline.add_ends([TokenOutput(5, [1]), ended()])
    assert spans(timeline, tmp_path / "t") == {
        "request 5": (10, 14), "waits": (10, 11), "prefill": (11, 12), "decode": (12, 14),
    }  # fmt: skip
    (whole,) = events(timeline, tmp_path / "t", ph="b", name="request 5")
    assert whole["args"] == {"finish_reason": "length", "cached_tokens": 32, "preemptions": 1}


@pytest.mark.parametrize(
    ("times", "names"),
    [
        ({"scheduled": None, "first": None, "last": None}, {"request 5", "waits"}),
        ({"first": None, "last": None}, {"request 5", "waits", "prefill"}),
    ],
)
def test_one_that_ends_early_has_the_spans_that_it_came_to(tmp_path, times, names):
    timeline = Timeline()
    timeline.add_ends([ended(reason="abort", **times)])
    found = spans(timeline, tmp_path / "t")
    assert found.keys() == names
    assert all(begin <= end for begin, end in found.values())


def test_only_the_last_are_kept_and_the_file_comes_whole(tmp_path):
    timeline = Timeline(capacity=3)
    for number in range(10):
        timeline.add_step(plan(1), number, number + 1, STATS)
        timeline.add_ends([ended(request_id=number)])
    assert [step["ts"] for step in events(timeline, tmp_path / "t", ph="X")] == [7e6, 8e6, 9e6]
    assert {event["id"] for event in events(timeline, tmp_path / "t", ph="b")} == {7, 8, 9}
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_a_folder_that_cannot_be_written_harms_no_engine(tmp_path, caplog):
    Timeline().write(tmp_path / "none" / "t")
    assert "could not be written" in caplog.text
