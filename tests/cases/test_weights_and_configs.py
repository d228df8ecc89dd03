"""Weights and configs mean what transformers makes of them, also where keys are missing, doubled or at odds."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashserve import LLM
from flashserve.errors import ConfigError
from model_facts import facts_of
from tiny_models import make_tiny_model

PROMPT = [7, 99, 250, 31, 8, 400]


def ours(folder, count=12):
    with LLM(folder, device="cpu", dtype="float32", kv_cache_memory_bytes=8 << 20, num_threads=1) as llm:
        (result,) = llm.generate([PROMPT], {"temperature": 0, "max_tokens": count, "ignore_eos": True})
    return result.token_ids


def transformers_own(folder, count=12):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, pad_token_id=0)[
        0, len(PROMPT) :
    ].tolist()


@pytest.mark.parametrize(
    ("family", "embedding"), [("qwen2", "model.embed_tokens.weight"), ("gpt2", "transformer.wte.weight")]
)
def test_a_stored_head_that_differs_from_the_embedding_is_the_head(tmp_path, family, embedding, caplog):
    folder = make_tiny_model(family, tmp_path)
    tied = ours(folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    weights["lm_head.weight"] = weights[embedding] + 0.1 * torch.randn_like(weights[embedding])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        assert ours(folder) == transformers_own(folder) != tied
    assert "lm_head.weight" in caplog.text


def test_a_stored_head_that_equals_it_stays_tied(tmp_path):
    folder = make_tiny_model("qwen2", tmp_path)
    tied, elements = ours(folder), facts_of(folder).weight_bytes
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert ours(folder) == tied
    assert facts_of(folder).weight_bytes == elements


def test_rope_scaling_comes_before_rope_parameters(tmp_path, edit, caplog):
    folder = make_tiny_model("qwen3", tmp_path, max_position_embeddings=256)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 192, "attn_factor": 1.0}
    edit(folder / "config.json", rope_scaling=scaling, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with caplog.at_level(logging.WARNING):
        assert facts_of(folder).context_len == 768
        assert ours(folder) == transformers_own(folder)
    assert "attn_factor" in caplog.text, "a key that nobody reads is said"


NULLS = {
    "quantization_config": None, "rope_scaling": None, "hidden_act": None, "attention_bias": None, "mlp_bias": None,
    "rms_norm_eps": None, "rope_theta": None, "partial_rotary_factor": None, "torch_dtype": None, "head_dim": None,
    "sliding_window": None, "layer_types": None, "use_sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_key_that_is_null_is_a_key_that_is_not_there(tmp_path, family, edit):
    folder = make_tiny_model(family, tmp_path, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    nulls = {key: value for key, value in NULLS.items() if key not in config}
    expected = ours(folder)
    edit(folder / "config.json", **nulls)
    edit(folder / "generation_config.json", temperature=None, eos_token_id=None, max_length=None)
    assert ours(folder) == expected


def test_no_quantisation_is_none(tmp_path, edit):
    folder = make_tiny_model("llama", tmp_path)
    for nothing in (None, {}):
        edit(folder / "config.json", quantization_config=nothing)
        assert facts_of(folder).architecture == "LlamaForCausalLM"
    edit(folder / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(ConfigError, match="quantised checkpoints are not supported"):
        facts_of(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", "four"), ("hidden_size", [64]), ("num_hidden_layers", None), ("num_attention_heads", 0)],
)
def test_a_key_that_makes_no_sense_is_named_or_its_file_is(tmp_path, edit, key, value):
    folder = make_tiny_model("llama", tmp_path)
    edit(folder / "config.json", **{key: value})
    with pytest.raises(ConfigError, match=r"config\.json"):
        facts_of(folder)


def test_whole_weights_beside_a_stale_index_are_served(tmp_path, caplog):
    folder = make_tiny_model("llama", tmp_path)
    expected = ours(folder)
    stale = {
        "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(stale))
    with caplog.at_level(logging.WARNING):
        assert ours(folder) == expected
    assert "model-00001-of-00002.safetensors" in caplog.text


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_ids_of_configs_are_judged_at_load(tmp_path, edit, file, caplog):
    """An id beyond the vocabulary once ended the engine, with the first request that ruled it out."""
    folder = make_tiny_model("llama", tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    edit(folder / file, eos_token_id=[0, 600, -1])
    with caplog.at_level(logging.WARNING):
        assert facts_of(folder).eos_token_ids == (0,)
    assert "600" in caplog.text
    with LLM(folder, device="cpu", dtype="float32", kv_cache_memory_bytes=8 << 20, num_threads=1) as llm:
        for _ in range(3):
            (result,) = llm.generate([PROMPT], {"min_tokens": 4, "max_tokens": 8, "temperature": 0})
            assert len(result.token_ids) >= 4
    edit(folder / file, eos_token_id="</s>")
    with pytest.raises(ConfigError, match="eos_token_id"):
        facts_of(folder)
