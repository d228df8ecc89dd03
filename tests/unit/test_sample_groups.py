"""Requests with several samples: one prompt, forks that share its blocks, ends of one and of all."""

from __future__ import annotations

import pytest
from mini_engine import MiniEngine
from oracle import name_of

from flashserve.errors import INVALID_ARG
from flashserve.scheduling.output import ScheduledRow

BOTH_ORDERS = pytest.mark.parametrize("run_ahead", [False, True], ids=["synchronous", "run-ahead"])


def rows(engine: MiniEngine) -> list[ScheduledRow]:
    return [row for plan in engine.plans for row in plan.rows]


@BOTH_ORDERS
@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 50])
def test_the_prompt_is_computed_once(run_ahead: bool, prompt: int) -> None:
    engine = MiniEngine(run_ahead=run_ahead)
    request = engine.add(prompt, 5, n=3)
    engine.run()
    engine.check_answers()
    engine.check_idle()
    assert len({tuple(engine.streams[name_of(request, index)]) for index in range(3)}) == 3
    assert sum(row.num_tokens for row in rows(engine)) == prompt + 3 * 4
    assert engine.scheduler.stats().prompt_tokens == prompt


@pytest.mark.parametrize("prompt, copies", [(7, 2), (8, 0), (9, 2)])
def test_only_a_block_that_is_not_full_is_copied_and_not_for_its_last_writer(prompt: int, copies: int) -> None:
    engine = MiniEngine(block_size=4)
    engine.add(prompt, 6, n=3)
    engine.step()
    assert engine.scheduler.stats().free_blocks == 64 - -(-prompt // 4)
    engine.step()
    assert [len(plan.block_copies) for plan in engine.plans] == [0, copies]
    assert engine.scheduler.stats().free_blocks == 64 - prompt // 4 - 3  # full blocks once, one more for each


def test_a_sample_that_is_the_only_one_left_writes_where_the_others_would_have() -> None:
    """The other two end with their first token, before anyone has written behind the prompt."""
    probe = MiniEngine(block_size=4)
    probe.add(6, 6, n=3)
    first = [probe.oracles[name_of(0, index)].generated[0] for index in range(3)]
    for survivor in range(3):
        engine = MiniEngine(block_size=4)
        stops = tuple(token for index, token in enumerate(first) if index != survivor)
        engine.add(6, 6, n=3, stop_token_ids=stops)
        engine.step()
        assert len(engine.ended) == 2
        engine.step()
        assert not engine.plans[-1].block_copies
        engine.run()
        engine.check_answers()
        engine.check_idle()


@BOTH_ORDERS
def test_samples_end_by_themselves_and_the_request_with_the_last(run_ahead: bool) -> None:
    engine = MiniEngine(run_ahead=run_ahead)
    request = engine.add(6, 30, n=4, stop_token_ids=tuple(range(0, 97, 9)))
    engine.run()
    ends = {engine.ended[name_of(request, index)].step for index in range(4)}
    assert len(ends) > 1
    engine.check_answers()
    engine.check_idle()


@BOTH_ORDERS
@pytest.mark.parametrize("steps", range(5))
def test_an_abort_ends_all_samples_and_leaks_nothing(run_ahead: bool, steps: int) -> None:
    engine = MiniEngine(run_ahead=run_ahead, max_num_batched_tokens=10)
    other = engine.add(3, 12)
    request = engine.add(18, 10, n=3)
    for _ in range(steps):
        engine.step()
    engine.abort(request)
    assert {engine.ended[name_of(request, index)].reason for index in range(3)} == {"abort"}
    engine.run()
    assert engine.streams[other] == engine.oracles[other].generated
    engine.check_idle()


def test_one_sample_can_be_aborted() -> None:
    engine = MiniEngine()
    request = engine.add(6, 10, n=3)
    engine.step()
    engine.step()
    engine.abort(samples=[(request, 1), (request, 1), (99, 0)])  # again, and of one that never was
    assert engine.ended[request, 1].reason == "abort" and len(engine.ended) == 1
    engine.run()
    assert [engine.ended[name].reason for name in (request, (request, 2))] == ["length", "length"]
    engine.check_idle()


def test_a_deadline_ends_all_samples() -> None:
    engine = MiniEngine()
    engine.add(6, 100, n=2, deadline=3.0)
    engine.step()
    engine.now = 3.0
    engine.step()
    assert [ended.reason for ended in engine.ended.values()] == ["deadline", "deadline"]
    engine.check_idle()


def test_a_row_in_flight_of_a_sample_that_ended_holds_nobody_up() -> None:
    """Its result is not taken in, and a preempted group waits for what is in flight before it is admitted again."""
    engine = MiniEngine(run_ahead=True)
    first = engine.add(6, 40, n=2, stop_token_ids=tuple(range(2, 12)))
    request = engine.scheduler._requests[first]
    while len(request.live) == 2:
        engine.step()
    (ended,) = [sequence for sequence in request.sequences if sequence not in request.live]
    assert ended.num_pending == 1
    engine.scheduler._preempt(request)
    engine.add(3, 5)
    engine.run()
    engine.check_answers()
    engine.check_idle()


@BOTH_ORDERS
def test_a_group_is_preempted_as_a_whole(run_ahead: bool) -> None:
    engine = MiniEngine(num_blocks=24, block_size=4, run_ahead=run_ahead, max_model_len=40)
    old, young = engine.add(18, 20, n=2), engine.add(9, 20, n=3)
    for _ in range(60):
        engine.step()
        if engine.scheduler.stats().preemptions:
            break
    assert {row.request_id for row in engine.plans[-1].rows} == {old}
    assert len(engine.scheduler._running.decoding) == 2
    engine.run()
    engine.check_answers()
    engine.check_idle()
    assert engine.ended[young].output.timings.preemptions > 0  # type: ignore[union-attr]


def test_a_group_waits_until_all_of_it_has_slots_and_blocks() -> None:
    engine = MiniEngine(max_num_seqs=4)
    running = engine.add(5, 8, n=2)
    engine.step()
    group, single = engine.add(5, n=3), engine.add(5)
    engine.step()
    assert engine.scheduler.stats().waiting == 2  # the single one does not overtake
    engine.run()
    assert engine.first_token_step[group] > engine.ended[running].step
    assert engine.first_token_step[single] >= engine.first_token_step[group]

    engine = MiniEngine(num_blocks=10, block_size=4, watermark_blocks=2)
    engine.add(13, 3)
    engine.step()
    engine.add(11, 1, n=3)  # three blocks for the prompt, two for the forks, two to be left: one is missing
    engine.step()
    assert engine.scheduler.stats().waiting == 1
    engine.run()
    engine.check_answers()


@pytest.mark.parametrize("n, max_tokens, most", [(9, 1, 8), (5, 24, 4), (3, None, 1)])
def test_samples_that_could_never_run_together_are_refused(n: int, max_tokens: int | None, most: int) -> None:
    engine = MiniEngine(num_blocks=32, block_size=4)
    request = engine.add(8, max_tokens, n=n)
    for index in range(n):
        error = engine.ended[name_of(request, index)].output.error
        assert error is not None and error.code == INVALID_ARG and f"at most {most} do" in error.message
    if most > 1:
        engine.add(8, max_tokens, n=most)
    engine.run()
    engine.check_idle()


@BOTH_ORDERS
def test_a_failed_step_ends_all_samples(run_ahead: bool) -> None:
    engine = MiniEngine(run_ahead=run_ahead)
    engine.add(6, 10, n=3)
    engine.step()
    engine.step()
    engine.step("submit")
    engine.run()
    assert {ended.reason for ended in engine.ended.values()} == {"error"} and len(engine.ended) == 3
    engine.check_idle()
