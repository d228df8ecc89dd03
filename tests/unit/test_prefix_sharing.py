"""Prefix sharing: who finds whose blocks, and what is never shared. FakeRunner checks the contents."""

from __future__ import annotations

import pytest
from mini_engine import MiniEngine

BOTH_ORDERS = pytest.mark.parametrize("run_ahead", [False, True], ids=["synchronous", "run-ahead"])


def test_a_prompt_shares_the_full_blocks_of_its_cached_prefix() -> None:
    engine = MiniEngine(block_size=4)
    prompt = list(range(100, 118))
    engine.add(prompt)
    engine.run()
    second = engine.add([*prompt, 1, 2, 3])
    engine.step()
    row = engine.row(second)
    assert row is not None
    assert (row.start, row.num_tokens) == (16, 5)
    engine.run()
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (18 + 21, 16)
    assert stats.prompt_tokens == 18 + 21
    timings = engine.ended[second].output.timings
    assert timings is not None and timings.cached_tokens == 16
    engine.check_answers()


def test_generated_tokens_are_cached_too() -> None:
    """The next turn of a conversation begins with the former answer."""
    engine = MiniEngine(block_size=4)
    first = engine.add(10, max_tokens=12)
    engine.run()
    turn = engine.oracles[first].tokens
    second = engine.add([*turn, 5])
    engine.step()
    row = engine.row(second)
    assert row is not None and row.start == 20  # 22 tokens, the last of them never computed
    engine.run()
    engine.check_answers()


def test_the_last_prompt_token_is_always_computed() -> None:
    engine = MiniEngine(block_size=4)
    prompt = list(range(100, 116))
    engine.add(prompt)
    engine.run()
    second = engine.add(prompt)
    engine.step()
    row = engine.row(second)
    assert row is not None and (row.start, row.num_tokens) == (12, 4)


def test_running_requests_share_while_they_run_and_within_one_step() -> None:
    engine = MiniEngine(block_size=4, max_num_seqs=16, max_num_batched_tokens=200)
    prompt = list(range(100, 116))
    engine.add([*prompt, 1], max_tokens=10)
    engine.step()
    before = engine.scheduler.stats().free_blocks
    second = engine.add([*prompt, 2], max_tokens=10)
    engine.step()
    assert before - engine.scheduler.stats().free_blocks == 1
    engine.run()
    engine.check_answers()
    timings = engine.ended[second].output.timings
    assert timings is not None and timings.cached_tokens == 16


@BOTH_ORDERS
@pytest.mark.parametrize("budget", [16, 400])
def test_requests_that_arrive_together_share_their_beginning(run_ahead: bool, budget: int) -> None:
    engine = MiniEngine(block_size=4, max_num_seqs=16, max_num_batched_tokens=budget, run_ahead=run_ahead)
    prompt = list(range(100, 140))
    for number in range(6):
        engine.add([*prompt, number], max_tokens=8)
    engine.run(until=lambda: len(engine.first_token_step) == 6)
    assert engine.scheduler.stats().prefix_cache_hits == 5 * 40
    assert engine.scheduler.stats().free_blocks <= 64 - 10 - 6  # ten blocks in common, and the ends
    assert engine.scheduler.stats().free_blocks >= 64 - 10 - 6 * 3
    engine.run()
    assert sorted(end.output.timings.cached_tokens for end in engine.ended.values()) == [0, *[40] * 5]  # type: ignore[union-attr]
    engine.check_answers()
    engine.check_idle()


def test_a_partial_block_is_never_shared() -> None:
    engine = MiniEngine(block_size=4)
    engine.add([9, 8, 7], max_tokens=1)
    engine.run()
    engine.add([9, 8, 7, 6, 5], max_tokens=1)
    engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == 0
    engine.check_answers()


def test_the_same_tokens_behind_another_beginning_are_not_shared() -> None:
    engine = MiniEngine(block_size=4)
    for prompt in ([1, 1, 1, 1, 5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [2, 2, 2, 2, 5, 6, 7, 8, 9]):
        engine.add(prompt)
        engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == 0
    engine.check_answers()


@pytest.mark.parametrize("differs_at", range(4))
def test_a_block_is_shared_only_if_all_of_its_tokens_agree(differs_at: int) -> None:
    engine = MiniEngine(block_size=4)
    prompt = [11, 12, 13, 14, 15]
    other = [token + 50 * (index == differs_at) for index, token in enumerate(prompt)]
    for tokens in (prompt, other):
        engine.add(tokens)
        engine.run()
    assert engine.scheduler.stats().prefix_cache_hits == 0
    engine.check_answers()


def test_salts_do_not_share() -> None:
    engine = MiniEngine(block_size=4)
    prompt = list(range(100, 120))
    for salt, hits in (("a", 0), ("b", 0), ("", 0), ("a", 16), ("b", 32), ("", 48)):
        engine.add(prompt, salt=salt)
        engine.run()
        assert engine.scheduler.stats().prefix_cache_hits == hits
    engine.check_answers()


def test_without_caching_nothing_is_looked_up() -> None:
    engine = MiniEngine(block_size=4, caching=False)
    for _ in range(2):
        engine.add(list(range(100, 120)))
        engine.run()
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (0, 0)
    engine.check_answers()


def test_what_was_used_longest_ago_is_evicted_first() -> None:
    engine = MiniEngine(num_blocks=12, block_size=4, max_model_len=24)
    prompts = [list(range(100 * i, 100 * i + 16)) for i in range(1, 4)]
    for prompt in (*prompts, prompts[0]):  # the first is used again at the end
        engine.add(prompt, max_tokens=1)
        engine.run()
    engine.add(16, max_tokens=1)  # takes four blocks: those of the second prompt
    engine.run()
    for prompt, hits in ((prompts[0], 12), (prompts[2], 12), (prompts[1], 0)):
        before = engine.scheduler.stats().prefix_cache_hits
        engine.add(prompt, max_tokens=1)
        engine.step()
        engine.abort(*engine.running())
        assert engine.scheduler.stats().prefix_cache_hits - before == hits
