"""The runner on a GPU that is simulated: the plan of its memory, and the pace of its prompts."""

from __future__ import annotations

import random

import pytest

from driver import Engine, load, random_prompts
from flashserve.engine.pacing import STRETCH, PrefillPacing
from simulated_gpu import STEP_S, TOKEN_S, SimulatedGpu

TOTAL = 23_700_000
SEQS, BUDGET, CONTEXT = 24, 48, 96
SETTINGS = {"max_num_seqs": SEQS, "max_num_batched_tokens": BUDGET, "max_model_len": CONTEXT}
EVERYTHING = {
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 40,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.1,
    "logprobs": 20,
    "prompt_logprobs": 20,
    "xtc_probability": 0.5,
    "logit_bias": {5: 1.0},
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A vocabulary beside which nothing else counts, as in small models of today."""
    from tiny_models import make_tiny_model

    return make_tiny_model("llama", tmp_path_factory.mktemp("wide"), vocab_size=8192)


def run_everything(engine: Engine) -> None:
    rng = random.Random(0)
    for index in range(2 * SEQS):
        prompt = [rng.randrange(3, 500) for _ in range(rng.randint(1, CONTEXT // 2))]
        engine.add(index, prompt, **(EVERYTHING if index % 3 else {}), seed=index)
    engine.finish()


def test_whatever_requests_ask_for_fits_beside_the_cache(wide):
    device = SimulatedGpu(TOTAL)
    with device.open():
        runner = load(wide, device, kv_cache_memory_bytes=None, gpu_memory_utilization=0.9, **SETTINGS)
        resolved = runner.resolved
        # The memory is the bound, and all of the share is taken.
        assert 2 * resolved.max_model_len < resolved.num_blocks * resolved.block_size < SEQS * CONTEXT
        run_everything(Engine(runner, max_tokens=8))
        assert device.queue.replays
        share = int(0.9 * TOTAL)
        assert 0.85 * share < device.memory.peak <= share  # since the plan was made: also what it measured with is gone
        runner.close()


def test_prompts_beside_decodes_are_paced_by_what_the_device_took(folder):
    """One decode takes 2.1 ms by the device's clock, so a prompt beside it may take five times that: 105 tokens."""
    budget = 256
    device = SimulatedGpu(64 << 20)
    with device.open():
        settings = {"max_num_seqs": 2, "max_num_batched_tokens": budget, "max_model_len": 1024}
        runner = load(folder, device, kv_cache_memory_bytes=1 << 20, **settings)
        engine = Engine(runner, max_tokens=80)
        engine.core.pacing = pacing = PrefillPacing(budget)
        short, long = random_prompts((9, 900))
        engine.add(0, short)
        while len(engine.tokens[0]) < 10:
            engine.step()
        assert pacing.limit() == budget  # nothing is known of prompts yet
        engine.add(1, long)
        steps = 0
        while not engine.tokens[1]:
            engine.step()
            steps += 1
        runner.close()
    best = (STRETCH - 1) * (STEP_S + TOKEN_S) / TOKEN_S
    assert 0.7 * best < pacing.limit() < best + 1  # less where captured steps compute padding, too
    assert steps >= 7  # instead of four
