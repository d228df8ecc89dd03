"""The runner on a GPU that is simulated: the plan of its memory, kept by whatever requests may ask for."""

from __future__ import annotations

import random

import pytest

from driver import Engine, load
from simulated_gpu import SimulatedGpu

TOTAL = 22_800_000
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
