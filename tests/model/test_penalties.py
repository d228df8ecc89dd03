"""Penalties, biases, bad words, DRY and XTC through the whole engine, also one that is a step ahead of its device."""

from __future__ import annotations

from functools import partial

import pytest

from driver import Engine, SeenLogits, load
from flashserve.engine.core import EngineCore, build_core
from flashserve.protocol import Abort, GenerateRequest, SamplingParams
from flashserve_kernels import Ops
from lazy_device import CapturableOps, LazyCpu
from plain_sampling import Case, plain_logits

LENGTHS = (3, 20, 45, 33, 7, 60, 16, 31)
NUM_TOKENS = 24
PENALTIES = {"presence_penalty": 1.2, "frequency_penalty": 0.8, "repetition_penalty": 1.3}
DRY = {"dry_multiplier": 3.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_breaker_ids": (5,)}
XTC = {"xtc_probability": 0.5, "xtc_threshold": 0.01}
SETTINGS = {"dtype": "float32", "max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 128}


@pytest.fixture
def start(on_each_device):
    return lambda **settings: Engine(on_each_device(**{**SETTINGS, **settings}), max_tokens=NUM_TOKENS)


@pytest.fixture
def late(folder):
    return lambda **settings: Engine(load(folder, LazyCpu(1), **{**SETTINGS, **settings}), max_tokens=NUM_TOKENS)


def bad_words(plain: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    """A token and a pair of tokens that the texts hold."""
    return (plain[0][4],), (plain[0][1], plain[0][2]), (plain[1][1], plain[1][2], plain[1][3])


def test_greedy_tokens_are_the_best_of_the_plainly_changed_logits(start, random_prompts):
    """Every request wants something else; two more than slots, so that slots are used again."""
    prompts = random_prompts(LENGTHS)
    engine = start()
    words = bad_words(engine.generate(prompts[:2]))
    wishes = [
        PENALTIES,
        {"bad_word_ids": words},
        {},
        {"logit_bias": {40: 4.0, 41: 3.9}, **PENALTIES},
        {**DRY, "logit_bias": {40: 8.0}},
        {"frequency_penalty": -1.0},
        {"repetition_penalty": 0.7},
        {**PENALTIES, **DRY, "bad_word_ids": words, "logit_bias": {7: 2.0}},
    ]
    engine.core = build_core(engine.runner.resolved, engine.runner, "another")
    seen = SeenLogits(engine.runner)
    for index, (prompt, own) in enumerate(zip(prompts, wishes, strict=True)):
        engine.add(index, prompt, **own)
    engine.finish()
    for index, (prompt, own) in enumerate(zip(prompts, wishes, strict=True)):
        tokens, params = engine.tokens[index], SamplingParams(**own)
        changed = 0
        for count, token in enumerate(tokens):
            raw = seen[index, len(prompt) + count - 1].tolist()
            x = plain_logits(raw, Case(params, prompt, tokens[:count]))
            assert x[token] >= max(x) - 1e-4, (index, count)
            changed += raw[token] < max(raw)
        assert bool(changed) == bool(own), index
    assert 1 < len(set(engine.tokens[4])) < NUM_TOKENS, "the favourite comes back, and not at once"
    engine.runner.close()


def test_recomputed_texts_go_on_as_they_would_have(start, random_prompts):
    """What was generated before a preemption counts after it; so does what each of several samples generated."""
    prompts = random_prompts(LENGTHS)
    whole, tight = start(), start(num_gpu_blocks_override=14, enable_prefix_caching=False)
    texts = []
    for engine in (whole, tight):
        for index, prompt in enumerate(prompts):
            engine.add(index, prompt, **({**PENALTIES, **DRY} if index % 2 else PENALTIES))
        engine.finish()
        texts.append(engine.tokens)
        engine.runner.close()
    assert tight.core.scheduler.stats().preemptions > 0
    assert texts[0] == texts[1]


def run(core: EngineCore, requests: list[GenerateRequest]) -> dict[tuple[int, int], list[int]]:
    """Tokens by request and sample."""
    tokens: dict[tuple[int, int], list[int]] = {}
    for request in requests:
        core.handle(request)
    while core.has_work:
        for output in core.step().outputs:
            assert output.error is None, output.error
            tokens.setdefault((output.request_id, output.index), []).extend(output.token_ids)
    return tokens


@pytest.mark.parametrize("wishes", [PENALTIES, {**PENALTIES, **DRY, **XTC}])
def test_each_sample_of_a_prompt_has_counts_of_its_own(start, wishes, random_prompts):
    runner = start().runner
    prompt = random_prompts([17])[0]
    sampled = SamplingParams(temperature=0.9, seed=5, max_tokens=NUM_TOKENS, ignore_eos=True, n=3, **wishes)
    together = run(build_core(runner.resolved, runner, "test"), [GenerateRequest(0, prompt, sampled, arrival=0.0)])
    alone = {}
    for index in range(3):
        own = SamplingParams(temperature=0.9, seed=5 + index, max_tokens=NUM_TOKENS, ignore_eos=True, **wishes)
        core = build_core(runner.resolved, runner, f"alone {index}")
        alone[0, index] = run(core, [GenerateRequest(0, prompt, own, arrival=0.0)])[0, 0]
    assert together == alone
    assert len({tuple(tokens) for tokens in together.values()}) == 3
    runner.close()


def test_greedy_neighbours_are_untouched_whatever_comes_and_goes(start, greedy_reference, folder, random_prompts):
    """Requests that want everything are cancelled at all times; their slots go to greedy ones and back."""
    prompts = random_prompts(LENGTHS)
    expected = greedy_reference(folder, prompts, NUM_TOKENS)
    engine = start(num_gpu_blocks_override=14)
    everything = {**PENALTIES, **DRY, **XTC, "bad_word_ids": ((9,), (10, 11)), "logit_bias": {3: 5.0}}
    for index, prompt in enumerate(prompts):
        engine.add(100 + index, prompt, temperature=1.0, seed=index, **everything)
        engine.add(index, prompt)
        engine.step()
        if index % 2:
            engine.step()
            engine.core.handle(Abort([100 + index, 100 + index - 1]))
    engine.finish()
    assert [engine.tokens[index] for index in range(len(prompts))] == expected
    stats = engine.core.scheduler.stats()
    assert stats.preemptions > 0
    assert (stats.running, stats.waiting, stats.free_blocks) == (0, 0, stats.total_blocks)
    engine.core.scheduler.check_integrity()
    assert set(engine.runner._processor._wishes) <= set(range(6))
    engine.generate(prompts[:6])  # all slots
    assert not engine.runner._processor._wishes
    engine.runner.close()


def test_a_request_that_looks_back_waits_for_its_last_token_and_nobody_else_does(late, random_prompts):
    engine = late()
    plans = []
    submit = engine.runner.submit
    engine.runner.submit = lambda plan: plans.append(plan) or submit(plan)
    prompts = random_prompts((9, 12))
    engine.add(0, prompts[0], **DRY)
    engine.add(1, prompts[1], **PENALTIES)
    engine.finish()
    rows = [[row for plan in plans for row in plan.rows if row.request_id == request] for request in (0, 1)]
    assert [token for row in rows[0] for token in row.token_ids] == prompts[0] + engine.tokens[0][:-1]
    assert [token for row in rows[1] for token in row.token_ids] == prompts[1], "the device knows its own samples"
    last = max(i for i, plan in enumerate(plans) if any(row.request_id == 1 for row in plan.rows))
    assert all(any(row.request_id == 1 for row in plan.rows) for plan in plans[1:last]), "a row in every step"
    engine.runner.close()


def test_what_nobody_asks_for_costs_nothing(late, random_prompts, monkeypatch):
    """No op of the processor, no byte: not before a request wants something, nor after it has gone."""
    calls = []
    for name in ("add_bias_", "apply_penalties_", "count_tokens_", "exclude_top_choices_"):
        watched = partial(lambda real, name, *call: calls.append(name) or real(*call), getattr(Ops, name), name)
        monkeypatch.setattr(CapturableOps, name, lambda *call, watched=watched: watched(*call), raising=False)
    engine = late(max_num_seqs=2)
    prompts = random_prompts(LENGTHS)
    engine.generate(prompts[:2], top_p=0.5)
    assert engine.runner._processor._counts is None
    engine.add(100, prompts[0], temperature=1.0, **PENALTIES, **XTC, logit_bias={4: 1.0})
    engine.finish()
    assert set(calls) == {"add_bias_", "apply_penalties_", "count_tokens_", "exclude_top_choices_"}
    calls.clear()
    queue = engine.runner._steps.queue
    before = queue.sent_bytes
    engine.generate(prompts)
    assert not calls and queue.sent_bytes == before
    engine.runner.close()
