"""Requests that wait for something outside the engine: passed over, and in their place once it is there."""

from __future__ import annotations

import pytest
from mini_engine import MiniEngine


def first_tokens(engine: MiniEngine) -> list[int]:
    """Request ids in the order of their first tokens."""
    return [int(name) for name in sorted(engine.first_token_step, key=engine.first_token_step.__getitem__)]  # type: ignore[arg-type]


def test_a_held_head_is_passed_over_and_keeps_its_place() -> None:
    engine = MiniEngine(max_num_seqs=1)
    held = engine.add(5, holds=("a grammar",))
    others = [engine.add(5) for _ in range(3)]
    engine.run(until=lambda: others[0] in engine.ended)
    engine.scheduler.release(held, "a grammar")
    engine.run()
    assert first_tokens(engine) == [others[0], held, *others[1:]]


def test_every_hold_must_be_released() -> None:
    engine = MiniEngine()
    request = engine.add(5, holds=("a grammar", "an image"))
    assert engine.step() is None
    for _ in range(2):
        engine.scheduler.release(request, "an image")
        assert engine.step() is None
    engine.scheduler.release(request, "a grammar")
    engine.run()
    engine.check_answers()


def test_an_engine_with_nothing_but_held_requests_says_so() -> None:
    engine = MiniEngine()
    request = engine.add(5, holds=("a grammar",))
    assert engine.core.is_held
    engine.add(5)
    assert not engine.core.is_held
    engine.run(until=lambda: 1 in engine.ended)
    assert engine.core.is_held and engine.core.has_work
    engine.scheduler.release(request, "a grammar")
    assert not engine.core.is_held


@pytest.mark.parametrize("end", ["abort", "deadline"])
def test_a_held_request_can_end(end: str) -> None:
    engine = MiniEngine()
    request = engine.add(5, holds=("a grammar",), deadline=7.0)
    engine.step()
    if end == "abort":
        engine.abort(request)
    engine.now = 7.0
    engine.step()
    assert engine.ended[request].reason == end
    engine.scheduler.release(request, "a grammar")  # too late, which nobody minds
    engine.check_idle()


def test_who_is_held_is_not_the_eldest_that_others_must_let_pass() -> None:
    """Requests with deadlines overtake eight times at most; behind one that cannot run they need not stop."""
    engine = MiniEngine(max_num_seqs=1)
    engine.add(5, holds=("a grammar",))
    for _ in range(20):
        engine.add(5, 1, deadline=1000.0)
    engine.run(until=lambda: len(engine.ended) == 20)
