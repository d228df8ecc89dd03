"""Checkpoints in every form that is supported, and clear refusals of all others."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.models.files import SafetensorsFolder
from flashserve.models.qwen2 import read_windows
from flashserve.models.registry import open_model
from model_facts import facts_of
from tiny_models import FAMILIES, make_tiny_model

PROMPT_LENGTHS = (12, 40)


def edit_json(file: Path, **changes) -> None:
    """Set keys; None removes one."""
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- what is read ---------------------------------------------------------------------------------------------


def test_facts_of_a_model(tmp_path):
    folder = make_tiny_model("llama", tmp_path, dtype="bfloat16")
    found = facts_of(folder)
    assert found.architecture == "LlamaForCausalLM"
    assert (found.context_len, found.vocab_size, found.num_layers) == (2048, 512, 2)
    assert (found.num_kv_heads, found.head_dim, found.dtype) == (2, 16, "bfloat16")
    assert found.weight_bytes == sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert found.eos_token_ids == (0,)
    assert found.card.tokenizer_file == str(folder / "tokenizer.json")
    assert facts_of(folder, dtype="float32").weight_bytes == 2 * found.weight_bytes


@pytest.mark.parametrize("generation, config, expected", [
    ([5, 6], 0, (5, 6)), (7, 0, (7,)), (None, [3, 4], (3, 4)), (None, 9, (9,)), (None, None, ()),
])  # fmt: skip
def test_eos_comes_from_the_generation_config_first(generation, config, expected, tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    edit_json(folder / "generation_config.json", eos_token_id=generation)
    edit_json(folder / "config.json", eos_token_id=config)
    edit_json(folder / "tokenizer_config.json", eos_token=None)  # it would come after
    assert facts_of(folder).eos_token_ids == expected
    if generation is None:
        (folder / "generation_config.json").unlink()
        assert facts_of(folder).eos_token_ids == expected


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_under_its_old_and_new_name(key, tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    edit_json(folder / "config.json", dtype=None)
    assert facts_of(folder).dtype == "float32"  # from the tensors
    edit_json(folder / "config.json", **{key: "bfloat16"})
    assert facts_of(folder).dtype == "bfloat16"


def test_old_style_rope_settings_mean_the_same(tmp_path, drive, greedy_reference, random_prompts):
    """``rope_theta`` and ``rope_scaling`` with ``type``, as checkpoints before transformers 5 have them."""
    parameters = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    folder = make_tiny_model("llama", tmp_path, rope_parameters=parameters)
    prompts = random_prompts(PROMPT_LENGTHS)
    expected = greedy_reference(folder, prompts, 8)
    scaling = {"type": "linear", "factor": 2.0}
    edit_json(folder / "config.json", rope_parameters=None, rope_theta=5000.0, rope_scaling=scaling)
    assert facts_of(folder).context_len == 2 * 2048
    assert drive(folder).generate(prompts, 8) == expected


@pytest.mark.parametrize("settings, windows", [
    ({}, (None, None, None)),
    ({"use_sliding_window": True}, (None, 9, 9)),
    ({"use_sliding_window": True, "layer_types": ["sliding_attention"] + ["full_attention"] * 2}, (9, None, None)),
    ({"layer_types": ["sliding_attention"] * 3}, (None, None, None)),
])  # fmt: skip
def test_which_layers_of_qwen_slide(settings, windows):
    """Older checkpoints have no ``layer_types``: layers from ``max_window_layers`` on slide, if any do."""
    config = {"num_hidden_layers": 3, "sliding_window": 9, "max_window_layers": 1, **settings}
    assert read_windows(config) == windows


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_files(family, tmp_path, drive, greedy_reference, random_prompts):
    folder = make_tiny_model(family, tmp_path, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    prompts = random_prompts(PROMPT_LENGTHS)
    assert drive(folder).generate(prompts, 8) == greedy_reference(folder, prompts, 8)


def test_a_second_copy_of_the_weights_is_left_alone(tmp_path, drive, greedy_reference, random_prompts):
    """Mistral's repositories hold consolidated.safetensors beside transformers' files."""
    folder = make_tiny_model("mistral", tmp_path)
    prompts = random_prompts(PROMPT_LENGTHS)
    expected = greedy_reference(folder, prompts, 8)
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, folder / "consolidated.safetensors")
    assert drive(folder).generate(prompts, 8) == expected


def test_gpt2_without_prefix_and_with_old_buffers(tmp_path, drive, greedy_reference, random_prompts):
    """The published "gpt2" checkpoint: no ``transformer.``, and the causal masks among the weights."""
    folder = make_tiny_model("gpt2", tmp_path)
    prompts = random_prompts(PROMPT_LENGTHS)
    expected = greedy_reference(folder, prompts, 8)

    def to_published(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 8, 8)
        tensors.pop("lm_head.weight", None)

    edit_weights(folder, to_published)
    assert drive(folder).generate(prompts, 8) == expected


def test_a_tied_head_may_be_stored_too(tmp_path, drive, greedy_reference, random_prompts):
    folder = make_tiny_model("qwen2", tmp_path)
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    prompts = random_prompts(PROMPT_LENGTHS)
    assert drive(folder).generate(prompts, 8) == greedy_reference(folder, prompts, 8)


@pytest.mark.parametrize("tied", [False, True])
def test_float16_checkpoints_run_in_bfloat16_on_a_cpu(tied, tmp_path, drive, random_prompts):
    folder = make_tiny_model("llama", tmp_path, dtype="float16", tie_word_embeddings=tied)
    driver = drive(folder)
    assert driver.resolved.dtype == "bfloat16"
    prompt = random_prompts([50])[0]
    exact = drive(folder, dtype="float32").first_logits(prompt)
    error = (driver.first_logits(prompt) - exact).norm() / exact.norm()
    assert error < 0.05
    half = drive(folder, dtype="float16").first_logits(prompt)
    assert (half - exact).norm() / exact.norm() < 0.005


# --- what is refused ------------------------------------------------------------------------------------------


def refusal(folder: Path, drive=None, **settings) -> str:
    with pytest.raises(ConfigError) as caught:
        facts_of(folder, **settings)
        drive(folder, **settings)
    return caught.value.message


def test_missing_tensor(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lack the tensor model.layers.1.mlp.up_proj.weight [128, 64]" in refusal(folder, drive)


def test_unexpected_tensors(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(64)}))
    assert name in refusal(folder, drive)


def test_a_checkpoint_with_more_layers_than_its_config(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    edit_json(folder / "config.json", num_hidden_layers=1)
    message = refusal(folder, drive)
    assert "model.layers.1.input_layernorm.weight" in message and "and 4 more" in message


def test_tensor_of_another_shape(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    assert "model.norm.weight has shape [65], config.json asks for [64]" in refusal(folder, drive)


def test_integer_weights(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}))
    assert "model.norm.weight has type I8" in refusal(folder, drive)


def test_unsupported_architecture_names_the_supported_ones(tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    edit_json(folder / "config.json", architectures=["MambaForCausalLM"])
    message = refusal(folder)
    assert "MambaForCausalLM" in message
    supported = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
    assert all(name in message for name in supported)


@pytest.mark.parametrize("changes, words", [
    ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "needs a factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantised checkpoints"),
    ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
])  # fmt: skip
def test_settings_that_no_model_implements(changes, words, tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    edit_json(folder / "config.json", **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize("changes", [
    {"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False},
    {"add_cross_attention": True},
])  # fmt: skip
def test_gpt2_settings_that_are_not_implemented(changes, tmp_path):
    folder = make_tiny_model("gpt2", tmp_path)
    edit_json(folder / "config.json", **changes)
    assert next(iter(changes)) in refusal(folder)


def test_pickle_weights_are_refused_with_advice(tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pickle" in message and "pytorch_model.bin" in message and "save_pretrained" in message


@pytest.mark.parametrize("damage", ["empty", "header length", "json", "truncated", "offsets"])
def test_broken_safetensors(damage, tmp_path):
    folder = make_tiny_model("llama", tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    file.write_bytes({
        "empty": b"",
        "header length": struct.pack("<Q", 1 << 60) + data[8:],
        "json": data[:8] + b"x" * length + data[8 + length :],
        "truncated": data[:-10],
        "offsets": data[:8] + data[8 : 8 + length].replace(b'"shape":[64]', b'"shape":[63]') + data[8 + length :],
    }[damage])  # fmt: skip
    assert "model.safetensors is not a valid safetensors file" in refusal(folder)


def test_index_that_names_missing_files(tmp_path):
    folder = make_tiny_model("llama", tmp_path, max_shard_size="100KB")
    gone = sorted(folder.glob("model-*.safetensors"))[-1]
    gone.unlink()
    assert gone.name in refusal(folder)


@pytest.mark.parametrize("model", ["/nowhere/at/all", "./not-here", "~/not-here-either"])
def test_folders_that_do_not_exist(model):
    with pytest.raises(ConfigError, match="does not exist"):
        open_model(EngineConfig(model=model))


def test_hub_ids_say_what_to_do_without_a_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="neither a folder nor in the local cache"):
        open_model(EngineConfig(model="someone/some-model"))


def test_a_hub_id_is_looked_for_in_the_download_dir(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--someone--some-model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    make_tiny_model("llama", snapshot)
    files = open_model(EngineConfig("someone/some-model", download_dir=str(tmp_path / "hub")))
    assert files.folder == snapshot


def test_a_folder_without_config(tmp_path):
    assert "config.json" in refusal(tmp_path)


# --- the prefix cache's root ----------------------------------------------------------------------------------


def test_fingerprint_tells_models_dtypes_and_layouts_apart(tmp_path):
    first = make_tiny_model("llama", tmp_path / "a")
    same = make_tiny_model("llama", tmp_path / "b")
    tuned = make_tiny_model("llama", tmp_path / "c", seed=1)
    other_config = make_tiny_model("llama", tmp_path / "d", rope_theta=20000.0)
    base = SafetensorsFolder(first).fingerprint("float32", "block16")
    assert SafetensorsFolder(same).fingerprint("float32", "block16") == base
    others = [
        SafetensorsFolder(tuned).fingerprint("float32", "block16"),
        SafetensorsFolder(other_config).fingerprint("float32", "block16"),
        SafetensorsFolder(first).fingerprint("bfloat16", "block16"),
        SafetensorsFolder(first).fingerprint("float32", "block32"),
    ]
    assert len({base, *others}) == 5
