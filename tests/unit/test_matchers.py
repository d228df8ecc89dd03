"""Sequences whose tokens must keep to something: masks in plans, their order with samples, and their ends."""

from __future__ import annotations

import pytest
from mini_engine import MiniEngine
from oracle import EOS, VOCAB_SIZE

from flashserve.engine.grammar.matcher import GrammarMatcher
from flashserve.errors import INVALID_ARG
from flashserve.protocol import ErrorInfo, GenerateRequest, SamplingParams
from flashserve.scheduling.request import Request
from flashserve.scheduling.sequence import MAX_FORCED, Sequence

EVERYTHING = (1 << VOCAB_SIZE) - 1


class Script:
    """Allows everything, but ends or refuses at a given token. Keeps what it was told. What it forces, and what it ends
    with, is set by tests."""

    end_token = 0
    least_tokens = 0

    def __init__(self, done_at: int = 1 << 30, refuses_at: int = 1 << 30, follows_samples: bool = True) -> None:
        self.done_at, self.refuses_at, self.follows_samples = done_at, refuses_at, follows_samples
        self.taken: list[int] = []
        self.forces: list[int] = []
        self.closings: dict[int, list[int]] = {}
        """By how many tokens are left."""
        self.copies: list[Script] = []

    @property
    def is_done(self) -> bool:
        return len(self.taken) >= self.done_at

    def forced(self, most: int) -> list[int]:
        return self.forces[:most]

    def mask(self) -> bytes:
        """Whose it is, and how far it is, can be read from it."""
        return (id(self) << 32 | len(self.taken)).to_bytes(16, "little")

    def ends_with(self, token_id: int, num_left: int) -> list[int] | None:
        return self.closings.get(num_left)

    def take(self, token_id: int) -> bool:
        self.taken.append(token_id)
        return len(self.taken) < self.refuses_at

    def copy(self) -> Script:
        self.copies.append(Script(self.done_at, self.refuses_at, self.follows_samples))
        return self.copies[-1]


def start(engine: MiniEngine, matcher: Script, prompt: int = 5, max_tokens: int = 6, **params: object) -> int:
    request = engine.add(prompt, max_tokens, holds=("a grammar",), **params)
    engine.scheduler.release(request, "a grammar", matcher)
    return request


def check_masks(engine: MiniEngine, matcher: Script) -> int:
    """Each mask that came from a matcher belongs to a row that samples, and counts its samples. Returns how many."""
    seen = 0
    for plan in engine.plans:
        for index, mask in plan.token_masks:
            number = int.from_bytes(mask, "little")
            if number >> 32 == id(matcher):
                assert plan.rows[index].num_logits == 1
                assert number & 0xFFFF_FFFF == seen
                seen += 1
    return seen


def test_every_sample_has_the_mask_of_all_samples_before_it():
    engine = MiniEngine()
    matcher = Script()
    request = start(engine, matcher)
    engine.add(7, 6)
    engine.run()
    engine.check_answers()
    assert matcher.taken == engine.streams[request]
    assert check_masks(engine, matcher) == 6
    assert all(len(plan.token_masks) <= 1 for plan in engine.plans), "the other request has none"


def test_without_such_a_request_plans_hold_none():
    engine = MiniEngine()
    start(engine, Script())
    engine.run()
    before = len(engine.plans)
    engine.add(5, 6)
    engine.run()
    assert len(engine.plans) > before
    assert not any(plan.token_masks for plan in engine.plans[before:])


def test_on_an_engine_that_runs_ahead_a_mask_waits_for_the_sample_before():
    engine = MiniEngine(run_ahead=True)
    matchers = [Script(), Script()]
    for matcher in matchers:
        start(engine, matcher)
    free = engine.add(5, 12)
    engine.run()
    engine.check_answers()
    for matcher in matchers:
        assert check_masks(engine, matcher) == 6
    assert sum(engine.row(free, plan) is not None for plan in engine.plans) == 12


def test_a_constant_mask_waits_for_no_sample_on_an_engine_that_runs_ahead():
    engine = MiniEngine(run_ahead=True)
    start(engine, Script(follows_samples=False))
    engine.run()
    engine.check_answers()
    assert [len(plan.token_masks) for plan in engine.plans] == [1] * 6


@pytest.mark.parametrize("seed", [1, 2])
def test_its_end_is_the_sequences_end_and_takes_no_step(seed: int):
    engine = MiniEngine()
    matcher = Script(done_at=3)
    request = start(engine, matcher, max_tokens=20, seed=seed)
    engine.run()
    assert engine.ended[request].reason == "stop"
    assert engine.ended[request].token_ids == [*matcher.taken, matcher.end_token]
    assert len(engine.plans) == len(matcher.taken) == 3
    engine.check_idle()


def test_an_end_that_max_tokens_has_no_room_for_is_none():
    engine = MiniEngine()
    request = start(engine, Script(done_at=3), max_tokens=3)
    engine.run()
    assert (engine.ended[request].reason, len(engine.ended[request].token_ids)) == ("length", 3)


def test_a_token_that_it_refuses_ends_the_sequence_with_an_error():
    engine = MiniEngine()
    request = start(engine, Script(refuses_at=3), max_tokens=20)
    other = engine.add(5, 6)
    engine.run()
    ended = engine.ended[request]
    assert (ended.reason, len(ended.token_ids)) == ("error", 2)
    assert ended.output.error is not None and ended.output.error.code == INVALID_ARG
    assert engine.ended[other].reason == "length"
    engine.check_idle()


def test_preemption_changes_nothing_for_it():
    engine = MiniEngine(num_blocks=10, block_size=2, max_num_seqs=4, caching=False)
    matchers = [Script() for _ in range(3)]
    for matcher in matchers:
        start(engine, matcher, prompt=4, max_tokens=8)
    engine.run()
    engine.check_answers()
    assert engine.scheduler.stats().preemptions > 0
    for matcher in matchers:
        assert check_masks(engine, matcher) == len(matcher.taken) == 8


def test_each_sample_of_a_request_has_its_own():
    engine = MiniEngine()
    matcher = Script()
    request = start(engine, matcher, n=3)
    engine.run()
    engine.check_answers()
    assert len(matcher.copies) == 2
    for index, each in enumerate([matcher, *matcher.copies]):
        assert each.taken == engine.streams[(request, index) if index else request]
        assert check_masks(engine, each) == 6


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_whose_grammar_is_refused_ends_with_the_reason(count: int):
    engine = MiniEngine()
    request = engine.add(5, holds=("a grammar",), n=count)
    engine.scheduler.refuse(request, ErrorInfo(INVALID_ARG, "no such thing"))
    engine.step()
    for index in range(count):
        ended = engine.ended[(request, index) if index else request]
        assert (ended.reason, ended.output.error) == ("error", ErrorInfo(INVALID_ARG, "no such thing"))
    engine.scheduler.refuse(request, ErrorInfo(INVALID_ARG, "again"))  # which nobody minds
    engine.check_idle()


def test_a_grammar_that_comes_too_late():
    engine = MiniEngine()
    request = engine.add(5, holds=("a grammar",))
    engine.abort(request)
    engine.scheduler.release(request, "a grammar", Script())
    engine.check_idle()
    assert engine.scheduler._requests.num_constrained == 0


def test_allowed_tokens_are_a_mask_of_their_own():
    engine = MiniEngine()
    engine.add(5, 3, allowed_token_ids=tuple(range(VOCAB_SIZE)))
    engine.run()
    assert [mask for plan in engine.plans for _, mask in plan.token_masks] == [EVERYTHING.to_bytes(16, "little")] * 3


class Broken:
    """A library that fails."""

    def compute_bitmask(self) -> bytes:
        raise RuntimeError("panic")

    def compute_ff_tokens(self) -> list[int]:
        raise RuntimeError("panic")


@pytest.mark.parametrize("ask", [lambda matcher: matcher.mask(), lambda matcher: matcher.forced(5)])
def test_a_library_that_fails_ends_its_own_sequence_only(ask, caplog: pytest.LogCaptureFixture):
    matcher = GrammarMatcher(Broken(), 0)  # type: ignore[arg-type]
    assert not any(ask(matcher))
    assert not matcher.take(5)
    assert "could not be computed" in caplog.text


# --- what a matcher forces -----------------------------------------------------------------------------------------


def sequence(matcher: Script, **params: object) -> Sequence:
    """One with a prompt of three tokens."""
    message = GenerateRequest(0, [2, 3, 4], SamplingParams(**params), arrival=0.0)  # type: ignore[arg-type]
    request = Request.from_message(message, seed=0, eos_token_ids=EOS, max_model_len=1000, root=b"")
    request.constrain(matcher)
    return request.sequences[0]


def forcing(*token_ids: int, **script: int) -> Script:
    matcher = Script(**script)  # type: ignore[arg-type]
    matcher.forces = list(token_ids)
    return matcher


def test_what_is_forced_is_taken_with_the_sample_before_it():
    matcher = forcing(6, 7, 8)
    text = sequence(matcher, max_tokens=20)
    assert text.take([5]) == ([5, 6, 7, 8], None)
    assert text.token_ids == [2, 3, 4, 5, 6, 7, 8] and matcher.taken == [5, 6, 7, 8]


@pytest.mark.parametrize("params", [{"logprobs": 0}, {"bad_word_ids": ((9,),)}], ids=str)
def test_tokens_of_which_more_is_asked_are_sampled(params: dict[str, object]):
    assert sequence(forcing(6, 7, 8), max_tokens=20, **params).take([5]) == ([5], None)


def test_no_more_is_forced_than_max_tokens_has_room_for():
    text = sequence(forcing(6, 7, 8), max_tokens=3)
    assert text.take([5]) == ([5, 6, 7], "length")


def test_what_is_forced_at_once_is_bounded():
    taken, reason = sequence(forcing(*range(2, 90)), max_tokens=200).take([5])
    assert (len(taken), reason) == (1 + MAX_FORCED, None)


@pytest.mark.parametrize("min_tokens", [0, 10])
def test_a_token_that_may_end_the_text_is_sampled(min_tokens: int):
    """Whether it ends the text there, min_tokens say to the sampler."""
    text = sequence(forcing(6, 7, 8), max_tokens=20, stop_token_ids=(7,), min_tokens=min_tokens)
    assert text.take([5]) == ([5, 6], None)


def test_a_forced_end_is_the_sequences_end():
    assert sequence(forcing(6, 7, 8, done_at=3), max_tokens=20).take([5]) == ([5, 6, 7, 0], "stop")
    assert sequence(forcing(6, 7, 8, done_at=3), max_tokens=3).take([5]) == ([5, 6, 7], "length")


def test_a_text_is_closed_in_place_of_what_is_forced():
    matcher = forcing(6, 7, 8)
    matcher.closings[6] = [20, 21]  # when the third token is to come
    assert sequence(matcher, max_tokens=9).take([5]) == ([5, 6, 20, 21], "length")


def test_what_is_forced_takes_no_steps_of_its_own():
    engine = MiniEngine()
    request, other = engine.add(5, 40, forces=True), engine.add(7, 40)
    engine.step()
    known = engine.oracles[request].known_after[5]
    assert len(engine.streams[request]) == known - 5
    engine.run()
    engine.check_answers()
    rows = [row for plan in engine.plans if (row := engine.row(request, plan))]
    assert len(rows) == len(engine.oracles[request].known_after) < 20
    assert all(row.num_logits == 1 for row in rows)
    assert sum(engine.row(other, plan) is not None for plan in engine.plans) == 40
    engine.check_idle()


def test_what_a_step_has_no_room_for_is_computed_in_the_next():
    engine = MiniEngine(max_num_seqs=2, max_num_batched_tokens=4)
    request = engine.add(4, 40, forces=True)
    other = engine.add(4, 60)
    engine.run()
    engine.check_answers()
    assert engine.runner.parts > 0
    first = next(step for step, plan in enumerate(engine.plans) if plan.rows[0].num_tokens == 1)
    assert all(engine.row(other, plan) for plan in engine.plans[first:]), "nobody waits for it"
    assert sum(engine.row(request, plan) is not None for plan in engine.plans) < 40


def test_a_row_takes_blocks_for_what_is_forced_as_far_as_others_leave_some():
    engine = MiniEngine(num_blocks=8, block_size=2, max_num_seqs=4, caching=False)
    request = engine.add(2, 12, forces=True)
    while not engine.runner.jumps:
        engine.step()
    row = engine.row(request)
    assert row is not None and len(row.new_block_ids) > 1
    engine.run()
    engine.check_answers()


def test_forced_text_is_found_in_the_prefix_cache():
    engine = MiniEngine(block_size=4)
    request = engine.add(4, 40, forces=True)
    engine.run()
    last = engine.row(request)
    assert engine.runner.jumps > 0 and last is not None
    engine.add(engine.oracles[request].tokens, 2)
    engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == (last.start + last.num_tokens) // 4 * 4


@pytest.mark.parametrize("run_ahead", [False, True])
def test_preemption_within_forced_text(run_ahead: bool):
    engine = MiniEngine(run_ahead=run_ahead, max_num_seqs=2, max_num_batched_tokens=4, caching=False)
    request = engine.add(4, 40, forces=True, presence_penalty=1.0)
    while not engine.runner.parts:
        engine.step()
    engine.scheduler._preempt(engine.scheduler._requests[request])
    engine.run()
    engine.check_answers()
    assert engine.scheduler.stats().preemptions == 1
    engine.check_idle()


@pytest.mark.parametrize("run_ahead", [False, True])
def test_samples_that_share_blocks_are_forced_each_its_own_way(run_ahead: bool):
    engine = MiniEngine(run_ahead=run_ahead)
    request = engine.add(6, 40, n=4, forces=True)
    engine.run()
    engine.check_answers()
    assert engine.runner.jumps > 4 and sum(len(plan.block_copies) for plan in engine.plans) == 3
    assert len({tuple(engine.streams[name]) for name in (request, *((request, index) for index in (1, 2, 3)))}) == 4
    engine.check_idle()
