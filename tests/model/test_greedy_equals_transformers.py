"""In float32 every family chooses transformers' tokens, whatever shares the batch and however prompts are cut."""

from __future__ import annotations

import pytest

from tiny_models import FAMILIES, make_tiny_model

LENGTHS = (1, 5, 16, 17, 40, 64, 90, 150, 33)
NUM_TOKENS = 24

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama without grouped heads": ("llama", {"num_key_value_heads": 4}),
    "llama odd head size": ("llama", {"head_dim": 24}),
    "rope llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "rope yarn": (
        "qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "large rope theta": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "mistral short window": ("mistral", {"sliding_window": 7}),
    "mistral window of a block": ("mistral", {"sliding_window": 16}),
    "mistral window longer than all": ("mistral", {"sliding_window": 1000}),
    "qwen2 upper layers slide": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3 window of a block": ("gemma3", {"sliding_window": 16, "tie_word_embeddings": False}),
    "gemma3 biases": ("gemma3", {"attention_bias": True}),
    "llama with the exact GELU": ("llama", {"hidden_act": "gelu"}),
    "gpt2 with the exact GELU": ("gpt2", {"activation_function": "gelu"}),
    "gpt2 inner size": ("gpt2", {"n_inner": 96}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path, drive, greedy_reference, random_prompts):
    folder = make_tiny_model(family, tmp_path)
    prompts = random_prompts(LENGTHS)
    expected = greedy_reference(folder, prompts, NUM_TOKENS)
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "the prompts must matter"
    driver = drive(folder)
    assert driver.generate(prompts, NUM_TOKENS, everyone=True) == expected
    assert driver.generate(prompts, NUM_TOKENS, max_chunk=13, seed=2) == expected
    assert driver.generate(prompts[:1], NUM_TOKENS) == expected[:1]
    assert driver.mixed_steps > 10


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path, drive, greedy_reference, random_prompts):
    family, overrides = VARIANTS[variant]
    folder = make_tiny_model(family, tmp_path, **overrides)
    prompts = random_prompts(LENGTHS)
    driver = drive(folder)
    assert driver.generate(prompts, NUM_TOKENS, max_chunk=50) == greedy_reference(folder, prompts, NUM_TOKENS)


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_block_sizes(block_size, tmp_path, drive, greedy_reference, random_prompts):
    folder = make_tiny_model("mistral", tmp_path)
    prompts = random_prompts(LENGTHS)
    driver = drive(folder, block_size=block_size)
    assert driver.generate(prompts, 8, max_chunk=40) == greedy_reference(folder, prompts, 8)


def test_the_whole_context(tmp_path, drive, greedy_reference, random_prompts):
    folder = make_tiny_model("llama", tmp_path, max_position_embeddings=256)
    prompts = random_prompts([246])
    assert drive(folder).generate(prompts, 10) == greedy_reference(folder, prompts, 10)


def test_a_reused_slot_starts_afresh(tmp_path, drive, greedy_reference, random_prompts):
    """One slot: each request overwrites what the last one left, and their blocks were another one's before."""
    folder = make_tiny_model("llama", tmp_path)
    prompts = random_prompts((70, 5, 33))
    driver = drive(folder, max_num_seqs=1, num_gpu_blocks_override=128, max_model_len=128)
    expected = greedy_reference(folder, prompts, 6)
    assert [driver.generate([prompt], 6, seed=i)[0] for i, prompt in enumerate(prompts)] == expected
