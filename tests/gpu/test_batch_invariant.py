"""The batch-invariant mode on a GPU: the same bits alone, beside others, in chunks, from the cache, with graphs."""

from __future__ import annotations

import pytest
import torch

from driver import Engine, load, random_prompts, sampled_logits
from flashserve.runner.device import open_device
from tiny_models import make_tiny_model

NUM_TOKENS = 12
PROMPT, *OTHERS = random_prompts([150, 3, 70, 17, 300, 40, 9])


def logits_of(engine: Engine, first_id: int, prompts: list[list[int]]) -> torch.Tensor:
    return sampled_logits(engine, first_id, prompts, NUM_TOKENS)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("family, dtype", [("llama", "float16"), ("qwen3", "float16"), ("mistral", "float32")])
def test_logits_do_not_depend_on_the_batch(family, dtype, kv_cache_dtype, tmp_path, device):
    """Heads of 64 and a hidden state of 1024, so that products have several tiles of each kind."""
    sizes = {"hidden_size": 1024, "intermediate_size": 1600, "head_dim": 64}
    folder = make_tiny_model(family, tmp_path, dtype=dtype, **sizes)
    found = []
    for budget, eager in ((512, False), (512, True), (24, False)):
        settings = {"batch_invariant": True, "kv_cache_dtype": kv_cache_dtype, "enforce_eager": eager}
        limits = {"max_num_seqs": 8, "max_num_batched_tokens": budget, "max_model_len": 512}
        engine = Engine(load(folder, open_device(device), **settings, **limits), max_tokens=NUM_TOKENS)
        found += [logits_of(engine, 0, [PROMPT]), logits_of(engine, 100, [PROMPT, *OTHERS])]  # then from the cache
        engine.core.close()
        engine = Engine(load(folder, open_device(device), **settings, **limits), max_tokens=NUM_TOKENS)
        found.append(logits_of(engine, 0, [PROMPT, *OTHERS]))
        engine.core.close()
    assert found[0].isfinite().all()
    assert [torch.equal(found[0], logits) for logits in found] == [True] * 9
