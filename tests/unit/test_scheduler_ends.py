"""How requests end: by themselves, aborted, too late, or in a failed step. Each exactly once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from mini_engine import MiniEngine
from oracle import EOS

from flashserve.errors import INTERNAL
from flashserve.scheduling.output import StepResult

BOTH_ORDERS = pytest.mark.parametrize("run_ahead", [False, True], ids=["synchronous", "run-ahead"])


def outcome(engine: MiniEngine, request_id: int) -> tuple[str, int]:
    ended = engine.ended[request_id]
    return ended.reason, len(ended.token_ids)


# --- by itself ----------------------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("max_tokens", [1, 2, 5])
def test_max_tokens_ends_with_length(run_ahead: bool, max_tokens: int) -> None:
    engine = MiniEngine(run_ahead=run_ahead)
    request = engine.add(7, max_tokens)
    engine.run()
    assert outcome(engine, request) == ("length", max_tokens)
    assert sum(row.num_tokens for plan in engine.plans for row in plan.rows) == 7 + max_tokens - 1  # no wasted row
    engine.check_answers()


@BOTH_ORDERS
def test_the_context_ends_what_max_tokens_does_not(run_ahead: bool) -> None:
    engine = MiniEngine(max_model_len=20, run_ahead=run_ahead)
    unlimited, beyond, full = engine.add(15, None), engine.add(15, 100), engine.add(19, 5)
    engine.run()
    assert outcome(engine, unlimited) == outcome(engine, beyond) == ("length", 5)
    assert outcome(engine, full) == ("length", 1)


def test_a_request_may_fill_all_blocks() -> None:
    engine = MiniEngine(num_blocks=5, block_size=4)
    request = engine.add(3, None)
    engine.run()
    assert outcome(engine, request) == ("length", 17)
    engine.check_idle()


def first_samples() -> list[int]:
    """What the first request of an engine samples after six tokens if nothing stops it."""
    engine = MiniEngine()
    engine.add(6, 12)
    return engine.oracles[0].generated


@BOTH_ORDERS
def test_a_stop_token_ends_with_stop_and_is_part_of_the_answer(run_ahead: bool) -> None:
    samples = first_samples()
    engine = MiniEngine(run_ahead=run_ahead)
    request = engine.add(6, 12, stop_token_ids=(samples[3],))
    engine.run()
    assert engine.ended[request].token_ids == samples[:4]
    assert engine.ended[request].reason == "stop"
    wasted = sum(row.num_tokens for plan in engine.plans for row in plan.rows) - (6 + 3)
    assert wasted == run_ahead  # at most one row, and only when running ahead
    engine.check_idle()


def test_a_stop_token_as_the_last_allowed_one_is_a_stop() -> None:
    samples = first_samples()
    engine = MiniEngine()
    request = engine.add(6, 4, stop_token_ids=(samples[3],))
    engine.run()
    assert outcome(engine, request) == ("stop", 4)


@pytest.mark.parametrize("min_tokens", [0, 1, 5])
def test_min_tokens_keeps_the_ends_away(min_tokens: int) -> None:
    ends = tuple(range(0, 97, 2))
    engine = MiniEngine()
    request = engine.add(6, 40, stop_token_ids=ends, min_tokens=min_tokens)
    plan = engine.step()
    assert plan is not None
    assert sorted(plan.admissions[0].end_token_ids) == list(ends)  # what the sampler masks at first
    engine.run()
    answer = engine.ended[request].token_ids
    assert len(answer) > min_tokens and not set(answer[:-1]) & set(ends)
    assert answer[-1] in ends
    engine.check_answers()


def test_an_end_token_that_comes_before_min_tokens_does_not_end() -> None:
    """The sampler should mask it; if it does not, the scheduler still keeps the promise."""
    engine = MiniEngine()
    engine.add(6, 8, stop_token_ids=(5,), min_tokens=3)
    plan = engine.scheduler.schedule(0.0)
    assert plan is not None
    for count in range(1, 5):
        engine.scheduler.update(plan, StepResult([[5]]), 0.0)
        (output,) = engine.scheduler.take_outputs()
        assert output.finish_reason == (None if count <= 3 else "stop")
        plan = engine.scheduler.schedule(0.0) or plan


def test_eos_ends_unless_ignored() -> None:
    def prompt_that_ends() -> list[int]:
        for first in range(2, 2000):
            engine = MiniEngine()
            engine.add([first], 10, ignore_eos=False)
            if engine.oracles[0].reason == "stop" and len(engine.oracles[0].generated) > 2:
                return [first]
        raise AssertionError("the fake model never ends")

    engine = MiniEngine()
    prompt = prompt_that_ends()
    heeded = engine.add(prompt, 10, ignore_eos=False)
    ignored = engine.add(prompt, 10, ignore_eos=True)
    engine.run()
    assert engine.ended[heeded].reason == "stop"
    assert engine.ended[heeded].token_ids[-1] in EOS
    assert outcome(engine, ignored) == ("length", 10)
    assert set(EOS) & set(engine.ended[ignored].token_ids)


def test_every_token_comes_out_in_the_step_that_sampled_it() -> None:
    engine = MiniEngine()
    request = engine.add(6, 5)
    for count in range(1, 6):
        engine.step()
        assert len(engine.streams[request]) == count
    assert engine.ended[request].step == 5


def test_timings_tell_when_what_happened() -> None:
    engine = MiniEngine(max_num_seqs=1, max_num_batched_tokens=8)
    engine.add(4, 3)
    second = engine.add(20, 2, arrival=0.5)
    while second not in engine.ended:
        engine.now += 1
        engine.step()
    timings = engine.ended[second].output.timings
    assert timings is not None
    assert (timings.arrival, timings.first_scheduled, timings.first_token, timings.last_token) == (0.5, 4.0, 6.0, 7.0)


# --- aborted, or too late: in every state -------------------------------------------------------------------


def waiting_request(engine: MiniEngine) -> int:
    for _ in range(4):
        engine.add(8, 20, priority=-1)
    return engine.add(50, 20, deadline=10.0)


def prefilling_request(engine: MiniEngine) -> int:
    engine.add(8, 20)
    request = engine.add(50, 20, deadline=10.0)
    engine.step()
    engine.step()
    row = engine.row(request)
    assert row is not None and not row.num_logits
    return request


def decoding_request(engine: MiniEngine) -> int:
    engine.add(8, 20)
    request = engine.add(8, 20, deadline=10.0)
    for _ in range(4):
        engine.step()
    assert len(engine.streams[request]) >= 2
    return request


def preempted_request(engine: MiniEngine) -> int:
    engine.add(24, 39, priority=-1)
    request = engine.add(20, 39, deadline=10.0)
    for _ in range(40):
        engine.step()
        if engine.scheduler.stats().preemptions:
            assert request not in [row.request_id for row in engine.plans[-1].rows]
            return request
    raise AssertionError("never preempted")


IN_EVERY_STATE = pytest.mark.parametrize(
    "reach", [waiting_request, prefilling_request, decoding_request, preempted_request]
)


def small_engine(run_ahead: bool) -> MiniEngine:
    return MiniEngine(num_blocks=16, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, run_ahead=run_ahead)


def assert_gone(engine: MiniEngine, request: int, reason: str) -> None:
    """It ended with this reason and what it had generated, holds nothing, and the others do not notice."""
    assert engine.ended[request].reason == reason
    assert engine.streams[request] == engine.oracles[request].generated[: len(engine.streams[request])]
    steps = len(engine.plans)
    engine.run()
    assert all(engine.row(request, plan) is None for plan in engine.plans[steps:])
    others = [i for i in engine.oracles if i != request]
    assert all(engine.ended[i].token_ids == engine.oracles[i].generated for i in others)
    engine.check_idle()


@BOTH_ORDERS
@IN_EVERY_STATE
def test_abort(reach: Callable[[MiniEngine], int], run_ahead: bool) -> None:
    engine = small_engine(run_ahead)
    request = reach(engine)
    tokens = len(engine.streams[request])
    held = len(engine.scheduler._requests[request].sequences[0].block_ids)
    free = engine.scheduler.stats().free_blocks
    engine.abort(request)
    assert engine.scheduler.stats().free_blocks == free + held  # at once, also with a row in flight
    engine.abort(request, 999)  # again, and one that never was
    assert_gone(engine, request, "abort")
    assert len(engine.streams[request]) == tokens


@BOTH_ORDERS
@IN_EVERY_STATE
def test_deadline(reach: Callable[[MiniEngine], int], run_ahead: bool) -> None:
    engine = small_engine(run_ahead)
    request = reach(engine)
    engine.now = 9.99
    engine.step()
    assert request not in engine.ended
    engine.now = 10.0
    engine.step()
    assert_gone(engine, request, "deadline")


def test_a_deadline_that_passed_before_arrival_ends_the_request_unscheduled() -> None:
    engine = MiniEngine()
    request = engine.add(5, deadline=0.0)
    assert engine.step() is None
    assert outcome(engine, request) == ("deadline", 0)
    timings = engine.ended[request].output.timings
    assert timings is not None and timings.first_scheduled is None


def test_deadlines_of_ended_requests_are_forgotten() -> None:
    """A client that sets an hour's timeout on each of its many short requests must not fill the memory."""
    engine = MiniEngine()
    for _ in range(300):
        engine.add(1, 1, deadline=3600.0)
        engine.run()
    assert len(engine.scheduler._requests._deadlines) < 100


def test_aborts_of_waiting_requests_leave_no_trace_behind_a_blocked_head() -> None:
    engine = MiniEngine(num_blocks=16, block_size=4, max_num_seqs=1)
    engine.add(4, 50)
    engine.step()
    engine.add(4, priority=-1)
    for _ in range(300):
        engine.abort(engine.add(4))
    assert len(engine.scheduler._waiting._heap) < 100
    engine.run()


@BOTH_ORDERS
def test_aborting_everything_frees_everything(run_ahead: bool) -> None:
    engine = MiniEngine(num_blocks=40, run_ahead=run_ahead, max_num_batched_tokens=16)
    for _ in range(30):
        engine.add(9, 20)
    for _ in range(5):
        engine.step()
    engine.abort(*range(30))
    engine.check_idle()
    engine.run()
    engine.add(9, 20)  # and slots and blocks work again
    engine.run()
    assert outcome(engine, 30) == ("length", 20)


# --- a failed step ------------------------------------------------------------------------------------------


@BOTH_ORDERS
@pytest.mark.parametrize("fault", ["submit", "wait"])
def test_a_failed_step_ends_its_requests_and_no_other(run_ahead: bool, fault: str) -> None:
    engine = MiniEngine(max_num_seqs=2, run_ahead=run_ahead)
    ids = [engine.add(6, 6) for _ in range(4)]
    engine.step()
    engine.step(fault)
    engine.run()
    for request in ids[:2]:
        error = engine.ended[request].output.error
        assert error is not None and error.code == INTERNAL and "failed" in error.message
    for request in ids[2:]:
        assert outcome(engine, request) == ("length", 6)
    engine.check_idle()


def test_nothing_is_reused_from_a_failed_step() -> None:
    engine = MiniEngine(block_size=4)
    prompt = list(range(100, 120))
    engine.add(prompt)
    engine.step(fault="submit")
    engine.add(prompt)
    engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == 0
    assert outcome(engine, 1) == ("length", 4)


def test_a_request_without_a_row_that_shares_blocks_of_the_failed_step_is_computed_anew() -> None:
    """The ninth prompt is admitted when the first has its row, and finds that one's blocks; then the step fails."""
    engine = MiniEngine(num_blocks=200, max_num_seqs=16, max_num_batched_tokens=32)
    prompt = list(range(100, 120))
    engine.add(prompt)
    for _ in range(7):
        engine.add(30)
    sharer = engine.add([*prompt, *range(40)])
    engine.step(fault="wait")
    stats = engine.scheduler.stats()
    assert stats.prefix_cache_hits > 0 and sharer not in engine.ended  # it was admitted, and had no row
    engine.run()
    assert engine.ended[sharer].token_ids == engine.oracles[sharer].generated
    engine.check_idle()


def test_a_step_behind_a_failed_one_gives_no_tokens_from_its_blocks() -> None:
    engine = MiniEngine(block_size=4, run_ahead=True)
    prompt = list(range(100, 120))
    engine.add(prompt, 10)
    engine.step()  # in flight
    sharer = engine.add([*prompt, 1, 2], 10)
    engine.step(fault="wait")  # the sharer's first row is in flight behind the step that fails
    engine.run()
    assert outcome(engine, sharer) == ("error", 0)
    engine.check_idle()
