"""Nobody waits for ever: no order of the queue starves a request of the same priority."""

import pytest
from mini_engine import MiniEngine

HOUR = 3600.0


def others_before(engine, patient, ask_again, most=200):
    """How many requests end before ``patient`` does, while each client asks again as soon as it has its answer."""
    clients = [ask_again() for _ in range(5)]
    waiting = patient()
    ended_before = len(engine.ended)
    while waiting not in engine.ended and len(engine.ended) < most:
        engine.now += 0.05
        engine.step()
        clients = [ask_again() if one in engine.ended else one for one in clients]
    return len(engine.ended) - ended_before


@pytest.mark.parametrize("run_ahead", [False, True])
def test_a_request_without_a_deadline_among_clients_that_have_one(run_ahead):
    engine = MiniEngine(max_num_seqs=1, run_ahead=run_ahead)
    count = others_before(engine, lambda: engine.add(3), lambda: engine.add(3, deadline=engine.now + HOUR))
    assert count <= 16


def test_a_late_deadline_among_clients_with_early_ones():
    engine = MiniEngine(max_num_seqs=1)
    count = others_before(
        engine, lambda: engine.add(3, deadline=engine.now + 9 * HOUR), lambda: engine.add(3, deadline=engine.now + HOUR)
    )
    assert count <= 16


def test_deadlines_still_come_first_for_the_most_part():
    engine = MiniEngine(max_num_seqs=1)
    late = [engine.add(3) for _ in range(3)]
    urgent = [engine.add(3, deadline=HOUR) for _ in range(6)]
    engine.run()
    ends = {one: engine.ended[one].step for one in (*late, *urgent)}
    assert sorted(ends, key=ends.__getitem__)[:6] == urgent


def test_a_better_priority_goes_first_all_the_same():
    engine = MiniEngine(max_num_seqs=1)
    low = engine.add(3, priority=5)
    high = [engine.add(3, priority=0) for _ in range(30)]
    engine.run()
    assert all(engine.ended[one].step < engine.ended[low].step for one in high)
