"""The bounded waiting queue: who is refused, and when it should try again."""

from __future__ import annotations

import pytest
from mini_engine import MiniEngine

from flashserve.errors import UNAVAILABLE
from flashserve.protocol import TokenOutput


def refusal(engine: MiniEngine, request_id: int) -> TokenOutput:
    output = engine.ended[request_id].output
    assert output.finish_reason == "error" and output.error is not None and output.error.code == UNAVAILABLE
    return output


def test_a_full_queue_refuses_with_a_time_to_retry() -> None:
    engine = MiniEngine(max_waiting_requests=3)
    ids = [engine.add(5) for _ in range(4)]
    output = refusal(engine, ids[3])
    assert output.error is not None and output.error.retry_after_ms is not None
    assert 100 <= output.error.retry_after_ms <= 60_000
    assert "3 requests with 15 tokens wait" in output.error.message
    engine.step()
    accepted = engine.add(5)
    engine.run()
    assert engine.ended[accepted].reason == "length"


def test_waiting_tokens_are_bounded_too() -> None:
    engine = MiniEngine(max_waiting_tokens=20)
    accepted, refused, fits = engine.add(15), engine.add(6), engine.add(5)
    refusal(engine, refused)
    engine.run()
    assert engine.ended[accepted].reason == engine.ended[fits].reason == "length"


def test_tokens_that_wait_no_longer_do_not_count() -> None:
    engine = MiniEngine(max_waiting_tokens=20)
    engine.add(15)
    engine.step()  # admitted
    aborted = engine.add(15)
    engine.abort(aborted)
    accepted = [engine.add(6), engine.add(14)]
    refusal(engine, engine.add(1))
    engine.run()
    assert all(engine.ended[i].reason == "length" for i in accepted)


def test_an_empty_queue_takes_any_request() -> None:
    engine = MiniEngine(max_waiting_tokens=20)
    request = engine.add(100)
    engine.run()
    assert engine.ended[request].reason == "length"


def test_aborting_makes_room_in_the_queue() -> None:
    engine = MiniEngine(max_waiting_requests=2)
    first = engine.add(5)
    engine.add(5)
    engine.abort(first)
    assert engine.add(5) not in engine.ended


def test_preempted_requests_come_back_even_into_a_full_queue() -> None:
    engine = MiniEngine(num_blocks=12, block_size=4, max_waiting_requests=1, max_waiting_tokens=1)
    ids = []
    for _ in range(3):
        ids.append(engine.add(8, 30))
        engine.step()
    engine.run()
    assert engine.scheduler.stats().preemptions > 0
    engine.check_answers()


@pytest.mark.parametrize("seconds_each", [0.05, 2.0])
def test_retry_after_follows_the_pace_of_admissions(seconds_each: float) -> None:
    waiting = 40
    engine = MiniEngine(max_num_seqs=1, max_waiting_requests=waiting)
    for _ in range(waiting):
        engine.add(4, 1)
    for _ in range(80):  # one request per step comes and goes
        engine.now += seconds_each
        engine.step()
        engine.add(4, 1)
    output = refusal(engine, engine.add(4, 1))
    assert output.error is not None and output.error.retry_after_ms is not None
    in_an_eighth_of_the_queue = 1000 * seconds_each * waiting / 8
    assert output.error.retry_after_ms == pytest.approx(in_an_eighth_of_the_queue, rel=0.1)
