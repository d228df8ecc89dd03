"""The engine one step ahead of a device that works through its queue whenever it likes."""

from __future__ import annotations

import random
from dataclasses import fields
from functools import partial

import pytest

from driver import Engine, load
from flashserve.protocol import Abort, SamplingParams
from flashserve.runner.model_runner import decode_batch_sizes, mixed_step_sizes
from flashserve.runner.sampler_state import COLUMNS
from flashserve.runner.staging import StepFields
from flashserve.runner.step_model import StepModel
from flashserve_kernels import Ops, Stage
from lazy_device import CapturableOps, LazyCpu

LENGTHS = (3, 20, 45, 33, 7, 60, 16, 31)
NUM_TOKENS = 24


class LateEngine(Engine):
    """Over a lazy device."""

    def __init__(self, folder, seed: int, **settings) -> None:
        device = LazyCpu(seed)
        defaults = {"max_num_seqs": 6, "max_num_batched_tokens": 32, "max_model_len": 128}
        super().__init__(load(folder, device, **{**defaults, **settings}), max_tokens=NUM_TOKENS)
        self.queue = device.queue


@pytest.fixture(scope="module")
def expected(folder, greedy_reference, random_prompts):
    """Transformers' tokens for the prompts of these tests."""
    return greedy_reference(folder, random_prompts(LENGTHS), NUM_TOKENS)


@pytest.fixture
def start(folder):
    return partial(LateEngine, folder)


@pytest.mark.parametrize("seed", range(4))
def test_tokens_are_those_of_transformers_however_late_the_device_is(seed, start, expected, random_prompts):
    """Six slots for eight requests: slots are used again while the step that freed them is still under way."""
    engine = start(seed)
    assert engine.generate(random_prompts(LENGTHS)) == expected
    # Two steps wait at once (an upload, two replays and a download each), and most steps are replayed.
    assert engine.queue.most_waiting >= 6
    assert engine.queue.replays > NUM_TOKENS


def test_preemption_while_a_step_is_under_way(start, expected, random_prompts):
    engine = start(1, num_gpu_blocks_override=14, enable_prefix_caching=False)
    assert engine.generate(random_prompts(LENGTHS)) == expected
    assert engine.core.scheduler.stats().preemptions > 0


@pytest.mark.parametrize("seed", range(3))
def test_aborts_between_submit_and_wait_change_nobody_else(
    seed, folder, start, expected, greedy_reference, random_prompts
):
    prompts = random_prompts(LENGTHS)
    rng = random.Random(seed)
    engine = start(seed)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt)
    gone = rng.sample(range(len(prompts)), 3)
    for victim in gone:
        for _ in range(rng.randint(1, 8)):
            engine.step()
        engine.core.handle(Abort([victim]))
    late = random_prompts((12, 40), seed=9)
    for index, prompt in enumerate(late, start=100):
        engine.add(index, prompt)
    engine.finish()
    for index in set(range(len(prompts))) - set(gone):
        assert engine.tokens[index] == expected[index]
    for index in gone:
        assert engine.tokens[index] == expected[index][: len(engine.tokens[index])]
    assert [engine.tokens[100], engine.tokens[101]] == greedy_reference(folder, late, NUM_TOKENS)
    stats = engine.core.scheduler.stats()
    assert stats.running == stats.waiting == 0


def test_greedy_steps_send_no_sampling_parameters_and_take_the_most_probable_tokens_only(
    start, expected, random_prompts, monkeypatch
):
    stages = []

    def watched(ops, *call):
        stages.append(call[-1])
        return Ops.sample(ops, *call)

    monkeypatch.setattr(CapturableOps, "sample", watched)
    engine = start(5, max_num_seqs=2)
    stages.clear()
    engine.add(100, random_prompts([9])[0], temperature=1.0)
    engine.finish()  # its slot's parameters lie on the device
    assert any(Stage.RANDOM in used for used in stages)
    stages.clear()
    before = engine.queue.sent_bytes
    for index, prompt in enumerate(random_prompts(LENGTHS)):
        engine.add(index, prompt, top_p=0.5, seed=index)
    engine.finish()
    assert [engine.tokens[index] for index in range(len(LENGTHS))] == expected
    assert engine.queue.sent_bytes == before
    assert stages and set(stages) == {Stage(0)}


def test_sampling_parameters_are_sent_when_a_request_is_admitted_and_never_again(start, random_prompts):
    engine = start(5)
    before = engine.queue.sent_bytes  # warming up admits, too
    for index, prompt in enumerate(random_prompts(LENGTHS[:3])):
        engine.add(index, prompt, temperature=0.5 * index, seed=index)
    while not all(engine.tokens.values()):
        engine.step()
    admitted = engine.queue.sent_bytes
    assert 0 < admitted - before <= 3 * 64  # a row of the table and its number for each
    engine.finish()
    assert engine.queue.sent_bytes == admitted
    assert not {column.name for column in COLUMNS} & {field.name for field in fields(StepFields)}


def test_sampled_and_masked_rows_are_those_of_a_device_that_is_in_time(folder, start, random_prompts, drive):
    prompts = random_prompts(LENGTHS[:5])
    params = [
        {"temperature": 0.9, "seed": 1},
        {"temperature": 0.9, "seed": 2, "top_k": 20},
        {"temperature": 0.9, "seed": 3, "top_p": 0.8},
        {"temperature": 0.0},
        {"temperature": 0.7, "seed": 4, "min_tokens": NUM_TOKENS, "stop_token_ids": (5, 9), "ignore_eos": False},
    ]
    engine = start(2)
    for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        engine.add(index, prompt, **own)
    engine.finish()
    driver = drive(folder)
    plain = [SamplingParams(**own) for own in params[:4]]
    assert [engine.tokens[i] for i in range(4)] == driver.generate(prompts[:4], NUM_TOKENS, plain)
    masked = driver.generate(prompts[4:], NUM_TOKENS, [SamplingParams(**params[4])], end_token_ids=(0, 5, 9))
    assert engine.tokens[4] == masked[0]


@pytest.mark.parametrize("num_seqs", [4, 6])
def test_single_tokens_of_which_some_do_not_sample(num_seqs, start, expected, random_prompts):
    """A budget of one token per request: prompts advance by single tokens in captured steps, unsampled but the last."""
    engine = start(3, max_num_seqs=num_seqs, max_num_batched_tokens=num_seqs)
    assert engine.generate(random_prompts(LENGTHS)) == expected


def test_batch_sizes_that_are_captured():
    assert decode_batch_sizes(1) == [1]
    assert decode_batch_sizes(3) == [1, 2, 3]
    assert decode_batch_sizes(100) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100]
    assert decode_batch_sizes(256)[-3:] == [224, 240, 256]


def test_token_counts_of_mixed_steps_that_are_captured():
    assert mixed_step_sizes(32) == [32]
    assert mixed_step_sizes(100) == [64, 100]
    assert mixed_step_sizes(8192)[:2] == [64, 128] and mixed_step_sizes(8192)[-1] == 2048
    assert len(mixed_step_sizes(8192)) == 16


@pytest.mark.parametrize("budget", [32, 200])
def test_every_step_of_a_small_budget_is_replayed(budget, start, expected, random_prompts, monkeypatch):
    """Prompts beside decodes, prompts alone, decodes: padded tokens are stored nowhere, padded rows have none."""
    engine = start(4, max_num_batched_tokens=budget)
    lengths = []

    def watched(model, step, own):
        lengths.append(own)
        return logits(model, step, own)

    logits = StepModel.logits
    monkeypatch.setattr(StepModel, "logits", watched)
    assert engine.generate(random_prompts(LENGTHS)) == expected
    assert engine.queue.replays > NUM_TOKENS
    assert not any(own.query_lens for own in lengths)  # which only a step has that runs op by op
