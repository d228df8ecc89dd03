"""What the scheduler promises: order, shares of a step, memory. Steps are counted, never seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
from mini_engine import MiniEngine

BOTH_ORDERS = pytest.mark.parametrize("run_ahead", [False, True], ids=["synchronous", "run-ahead"])


def finish_order(engine: MiniEngine, ids: Iterable[int]) -> list[int]:
    """Ids by the step in which their first token came out."""
    return sorted(ids, key=lambda i: (engine.first_token_step[i], i))


# --- who is next --------------------------------------------------------------------------------------------


def test_first_come_first_served() -> None:
    engine = MiniEngine(max_num_seqs=1)
    ids = [engine.add(5, arrival=float(arrival)) for arrival in (3, 1, 2)]
    engine.run()
    assert finish_order(engine, ids) == [ids[1], ids[2], ids[0]]
    engine.check_answers()


def test_lower_priority_value_goes_first_then_the_nearer_deadline_then_arrival() -> None:
    engine = MiniEngine(max_num_seqs=1)
    plain = engine.add(5)
    later = engine.add(5, deadline=900.0)
    sooner = engine.add(5, deadline=800.0)
    background = engine.add(5, priority=1, deadline=10.0)
    urgent = engine.add(5, priority=-1)
    engine.run()
    order = [urgent, sooner, later, plain, background]
    assert finish_order(engine, order) == order


def test_the_next_in_line_is_not_overtaken_because_it_needs_more_memory() -> None:
    """Else a long prompt would wait for ever under a flow of short ones."""
    engine = MiniEngine(num_blocks=20, block_size=4)
    running = engine.add(40, max_tokens=12)
    engine.step()
    engine.step()
    long = engine.add(60)
    short = engine.add(4)
    engine.run()
    assert engine.ended[running].step < min(engine.first_token_step[long], engine.first_token_step[short])


def test_a_newcomer_of_better_priority_is_admitted_before_those_that_wait() -> None:
    engine = MiniEngine(max_num_seqs=1)
    engine.add(5)
    engine.step()
    waiting = engine.add(5)
    urgent = engine.add(5, priority=-1)
    engine.run()
    assert engine.first_token_step[urgent] < engine.first_token_step[waiting]


# --- shares of a step ---------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_a_long_prompt_is_computed_in_chunks_of_the_budget(run_ahead: bool) -> None:
    engine = MiniEngine(max_num_batched_tokens=32, run_ahead=run_ahead)
    request = engine.add(100, max_tokens=2)
    engine.run()
    rows = [row for plan in engine.plans for row in plan.rows]
    assert [(row.start, row.num_tokens, row.num_logits) for row in rows] == [
        (0, 32, False),
        (32, 32, False),
        (64, 32, False),
        (96, 4, True),
        (100, 1, True),
    ]
    assert rows[-1].token_ids == []  # decoding reads the sample on the device
    assert engine.scheduler.stats().prefill_chunks == 3
    assert engine.first_token_step[request] == (5 if run_ahead else 4)
    engine.check_answers()


def test_one_step_carries_decodes_the_end_of_one_prompt_and_the_beginning_of_the_next() -> None:
    engine = MiniEngine(max_num_batched_tokens=16)
    decoding = engine.add(8, max_tokens=8)
    engine.step()
    first, second = engine.add(10), engine.add(30)
    plan = engine.step()
    assert plan is not None
    assert [(row.request_id, row.num_tokens) for row in plan.rows] == [(decoding, 1), (first, 10), (second, 5)]
    assert plan.num_tokens == 16


@BOTH_ORDERS
@pytest.mark.parametrize("prompt", [1, 31, 32, 33, 64, 90])
@pytest.mark.parametrize("busy_with", ["a decode", "a prefill", "a long cached context"])
def test_a_newcomer_gets_its_first_token_soon(run_ahead: bool, prompt: int, busy_with: str) -> None:
    budget = 32
    engine = MiniEngine(num_blocks=1000, max_num_batched_tokens=budget, run_ahead=run_ahead)
    if busy_with == "a prefill":
        engine.add(3000)
    elif busy_with == "a decode":
        engine.add(20, max_tokens=400)
    else:
        engine.add(1000, max_tokens=200)
        engine.run(until=lambda: 0 in engine.first_token_step)
    for _ in range(10):
        engine.step()
    assert 0 not in engine.ended
    newcomer = engine.add(prompt)
    before = engine.steps
    engine.run(until=lambda: newcomer in engine.first_token_step)
    assert engine.first_token_step[newcomer] - before <= math.ceil(prompt / budget) + 2


@pytest.mark.parametrize("prompt, priority", [(100, 0), (100, 1), (600, -1)])
def test_a_newcomer_that_goes_first_does_not_wait_behind_many_long_prefills(prompt: int, priority: int) -> None:
    engine = MiniEngine(num_blocks=2000, max_num_seqs=16, max_num_batched_tokens=32)
    for _ in range(8):
        engine.add(600)
    engine.step()
    newcomer = engine.add(prompt, priority=priority)
    before = engine.steps
    engine.run(until=lambda: newcomer in engine.first_token_step)
    waited = engine.first_token_step[newcomer] - before
    if priority <= 0:
        # Those that were passed over for long take a step now and then.
        assert waited <= math.ceil(prompt / 32) * 17 / 16 + 2
    else:
        assert waited > 8 * 600 / 32 - 10


def test_more_long_prompts_than_can_be_in_work_wait_outside_and_hold_nothing() -> None:
    engine = MiniEngine(num_blocks=2000, max_num_seqs=16, max_num_batched_tokens=32)
    for _ in range(12):
        engine.add(600)
    engine.step()
    stats = engine.scheduler.stats()
    assert (stats.running, stats.waiting) == (8, 4)


@BOTH_ORDERS
def test_decodes_get_their_token_in_every_step_whatever_is_prefilled(run_ahead: bool) -> None:
    engine = MiniEngine(num_blocks=400, max_num_seqs=6, max_num_batched_tokens=8, run_ahead=run_ahead)
    decoding = [engine.add(1, max_tokens=60) for _ in range(5)]
    engine.run(until=lambda: len(engine.first_token_step) == 5)
    engine.add(600)
    for _ in range(40):
        plan = engine.step()
        assert plan is not None
        assert [row.request_id for row in plan.rows] == [*decoding, 5]
        assert [row.num_tokens for row in plan.rows] == [1, 1, 1, 1, 1, 3]


def test_a_long_prefill_is_not_starved_by_a_flow_of_short_ones() -> None:
    engine = MiniEngine(num_blocks=400, max_num_batched_tokens=32)
    long = engine.add(320)
    passed = longest = 0
    while long not in engine.first_token_step:
        engine.add(31, max_tokens=1)  # two of these would fill more than each step
        engine.add(31, max_tokens=1)
        engine.step()
        assert engine.steps < 250
        passed = 0 if engine.row(long) else passed + 1
        longest = max(longest, passed)
    assert 0 < longest <= 16


def test_a_prefill_that_gets_a_part_of_each_step_does_not_claim_to_be_passed_over() -> None:
    engine = MiniEngine(num_blocks=400, max_num_batched_tokens=32)
    engine.add(1000)
    for _ in range(25):
        engine.add(20, max_tokens=1)
        engine.step()
        assert [row.num_tokens for row in engine.plans[-1].rows] == [20, 12]


def test_prefills_of_better_priority_go_first() -> None:
    engine = MiniEngine(num_blocks=400, max_num_batched_tokens=32)
    engine.add(200)
    engine.step()
    urgent = engine.add(300, priority=-1)
    engine.run(until=lambda: urgent in engine.first_token_step)
    assert 0 not in engine.first_token_step


def test_a_step_never_exceeds_the_budget_when_every_slot_decodes() -> None:
    engine = MiniEngine(max_num_seqs=4, max_num_batched_tokens=4)
    for _ in range(9):
        engine.add(3, max_tokens=9)
    engine.run()
    assert max(plan.num_tokens for plan in engine.plans) == 4
    engine.check_answers()


# --- preemption ---------------------------------------------------------------------------------------------


@BOTH_ORDERS
def test_the_youngest_of_the_worst_priority_is_preempted(run_ahead: bool) -> None:
    engine = MiniEngine(num_blocks=16, block_size=4, run_ahead=run_ahead)
    ids = [
        engine.add(8, 40, priority=0, arrival=1.0),
        engine.add(8, 40, priority=1, arrival=2.0),
        engine.add(8, 40, priority=1, arrival=3.0),
        engine.add(8, 40, priority=0, arrival=4.0),
    ]
    order: list[int] = []
    while len(order) < 3:
        engine.step()
        order += [i for i in ids if engine.scheduler._requests[i].preemptions and i not in order]
    assert order == [ids[2], ids[1], ids[3]]
    engine.run()
    engine.check_answers()
    timings = engine.ended[ids[0]].output.timings
    assert timings is not None and timings.preemptions == 0


def test_a_preempted_request_resumes_through_the_cache_and_keeps_its_answer() -> None:
    engine = MiniEngine(num_blocks=12, block_size=4)
    old, young = engine.add(17, 20), engine.add(17, 12)
    engine.run()
    engine.check_answers()
    assert engine.scheduler.stats().preemptions > 0
    admitted = [plan for plan in engine.plans if any(a.request_id == young for a in plan.admissions)]
    resumed = engine.row(young, admitted[1])
    assert resumed is not None and resumed.start >= 8
    assert engine.ended[old].step < engine.ended[young].step
    timings = engine.ended[young].output.timings
    assert timings is not None and timings.cached_tokens == 0  # counted at the first admission only


def test_a_sample_in_flight_of_a_preempted_request_is_kept() -> None:
    engine = MiniEngine(num_blocks=12, block_size=4, run_ahead=True, caching=False)
    engine.add(16, 20)
    engine.add(16, 20)
    engine.run()
    assert engine.scheduler.stats().preemptions > 0
    engine.check_answers()  # FakeRunner checks that no sample is drawn twice


def test_a_request_whose_last_sample_is_in_flight_needs_no_block_and_preempts_nobody() -> None:
    engine = MiniEngine(num_blocks=6, block_size=4, run_ahead=True, watermark_blocks=0)
    engine.add(5, max_tokens=4)  # its ninth token would begin a third block, but is never computed
    engine.add(13, max_tokens=4)  # nor is the seventeenth of this one, and there is no block for either
    engine.run()
    assert engine.scheduler.stats().preemptions == 0
    engine.check_answers()


@BOTH_ORDERS
def test_the_oldest_always_progresses(run_ahead: bool) -> None:
    engine = MiniEngine(num_blocks=10, block_size=2, run_ahead=run_ahead)
    oldest = engine.add(3, max_tokens=17)
    for _ in range(17 + run_ahead):
        engine.add(6, max_tokens=14)
        engine.step()
        assert engine.row(oldest) is not None or oldest in engine.ended or engine.steps == 17 + run_ahead
    assert oldest in engine.ended
    engine.run(5000)
    engine.check_answers()


# --- admission and memory -----------------------------------------------------------------------------------


def test_a_prompt_holds_all_its_blocks_from_admission() -> None:
    engine = MiniEngine(num_blocks=32, block_size=4, max_num_batched_tokens=8)
    engine.add(100)
    engine.step()
    assert engine.scheduler.stats().free_blocks == 32 - 25


def test_admission_leaves_the_watermark_free() -> None:
    def running(watermark: int) -> int:
        engine = MiniEngine(num_blocks=12, block_size=4, watermark_blocks=watermark)
        for _ in range(3):
            engine.add(16)
        engine.step()
        return engine.scheduler.stats().running

    assert [running(watermark) for watermark in (0, 1, 4, 5)] == [3, 2, 2, 1]


def test_the_watermark_never_keeps_a_single_request_out() -> None:
    engine = MiniEngine(num_blocks=4, block_size=4, watermark_blocks=100)
    for _ in range(3):
        engine.add(15, max_tokens=1)
    engine.run()
    engine.check_answers()


def test_shared_blocks_do_not_count_against_the_watermark() -> None:
    prompt = list(range(100, 124))
    engine = MiniEngine(num_blocks=10, block_size=4, watermark_blocks=1)
    engine.add(prompt, max_tokens=8)
    engine.step()
    engine.add([*prompt, 7], max_tokens=2)  # six blocks are there, one more is needed
    engine.step()
    assert engine.scheduler.stats().running == 2
