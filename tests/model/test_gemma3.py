"""Gemma 3: the same numbers as transformers' on every CPU path, with windows shorter than the prompts."""

from __future__ import annotations

import pytest
import torch

from flashserve import LLM
from flashserve.errors import ConfigError
from flashserve.models.gemma3 import Gemma3ForCausalLM
from flashserve_kernels.cpu.library import supported_isas
from tiny_models import make_tiny_model

PATHS = [*(f"native:{isa}" for isa in supported_isas()), "torch"]
WINDOW = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a soft cap of the logits, which Gemma 3 has no more, but its configuration has."""
    return make_tiny_model("gemma3", tmp_path_factory.mktemp("gemma3"), final_logit_softcapping=5.0)


@pytest.fixture(scope="module")
def prompts(random_prompts):
    """Two share their first 70 tokens."""
    long, short = random_prompts((90, 33))
    return [long, long[:70] + short, short]


@pytest.fixture(scope="module")
def expected(folder, prompts, greedy_reference):
    """Transformers' logits after each prompt, and its next tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
    return logits, greedy_reference(folder, prompts, 12)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    monkeypatch.setenv("FLASHSERVE_KERNELS", request.param)


def test_logits_are_transformers(path, folder, prompts, expected, drive):
    driver = drive(folder, dtype="float32")
    for prompt, theirs in zip(prompts, expected[0], strict=True):
        assert len(prompt) > WINDOW and theirs.abs().max() < 5
        torch.testing.assert_close(driver.first_logits(prompt), theirs, rtol=0, atol=1e-4)


def test_tokens_are_transformers_from_the_prefix_cache_too(path, folder, prompts, expected):
    settings = {
        "num_threads": 1,
        "kv_cache_memory_bytes": 1 << 20,
        "max_model_len": 128,
        "max_num_batched_tokens": 32,
        "max_num_seqs": 4,
    }
    with LLM(folder, dtype="float32", **settings) as llm:
        params = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
        for _ in range(2):
            assert [llm.generate(prompt, params)[0].token_ids for prompt in prompts] == expected[1]
        assert llm.stats().prefix_cache_hits >= 64 + 80 + 96 + 32


OLDER = {
    "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 1000, "max_position_embeddings": 32768,
    "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
}  # fmt: skip


def test_older_configurations_say_the_same_in_other_keys():
    spec = Gemma3ForCausalLM.read_spec(OLDER)
    assert spec.windows == (512, 512, 512, 512, 512, None, 512)
    assert (spec.rope.theta, spec.rope.rope_type, spec.rope.parameters["factor"]) == (1e6, "linear", 8.0)
    assert spec.local_rope is not None and (spec.local_rope.theta, spec.local_rope.rope_type) == (1e4, "default")
    assert (spec.tied_head, spec.activation, spec.context_len) == (True, "gelu_tanh", 32768)
    assert (spec.attention_scale, spec.embedding_scale) == (1 / 16, 640**0.5)
    newer = {key: value for key, value in OLDER.items() if not key.startswith(("rope", "sliding_window_pattern"))}
    newer["rope_parameters"] = {
        "full_attention": {"rope_theta": 1e6, **OLDER["rope_scaling"]},
        "sliding_attention": {"rope_theta": 1e4},
    }
    newer["layer_types"] = ["sliding_attention" if window else "full_attention" for window in spec.windows]
    assert Gemma3ForCausalLM.read_spec(newer) == spec


@pytest.mark.parametrize("changes, words", [
    ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"hidden_activation": "relu"}, "hidden_activation='relu'"),
    ({"layer_types": ["full_attention"]}, "7 layers"),
])  # fmt: skip
def test_what_is_not_implemented_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Gemma3ForCausalLM.read_spec({**OLDER, **changes})
