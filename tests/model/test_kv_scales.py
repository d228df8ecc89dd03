"""Scales of an FP8 KV cache in checkpoints: where they are read, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.models.files import SafetensorsFolder
from flashserve.models.kv_scales import read_kv_scales
from flashserve_kernels import KVScales
from model_facts import facts_of
from tiny_models import make_tiny_model

SCALES = (KVScales(0.0123, 0.5), KVScales(3.0, 1.7))
ATTENTION = "model.layers.{layer}.self_attn."


@pytest.fixture
def folder(tmp_path):
    return make_tiny_model("llama", tmp_path)


def store(folder, tensors: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **tensors}, folder / "model.safetensors", {"format": "pt"})


def named(spelling: str, shape: tuple[int, ...] = (1,)) -> dict[str, torch.Tensor]:
    """Both layers' scales; {0} is k or v."""
    return {
        ATTENTION.format(layer=layer) + spelling.format(kind): torch.full(shape, getattr(scales, kind))
        for layer, scales in enumerate(SCALES)
        for kind in "kv"
    }


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize(
    "spelling", ["{0}_scale", "attn.{0}_scale", "{0}_proj.output_scale", "{0}_proj.{0}_scale", "qkv_proj.{0}_scale"]
)
def test_spellings(spelling, shape, folder, drive):
    """Exactly, in a model that runs in another dtype too; and a model whose cache has no use for them loads."""
    store(folder, named(spelling, shape))
    found = read_kv_scales(SafetensorsFolder(folder), 2)
    assert found == tuple(KVScales(*torch.tensor(both).tolist()) for both in SCALES)
    drive(folder, dtype="bfloat16")


def test_one_scale_for_both_and_one_for_queries(folder, drive):
    both = {ATTENTION.format(layer=layer) + "kv_scale": torch.tensor(0.25) for layer in range(2)}
    store(folder, {**both, ATTENTION.format(layer=0) + "q_scale": torch.tensor(2.0)})
    assert read_kv_scales(SafetensorsFolder(folder), 2) == (KVScales(0.25, 0.25),) * 2
    drive(folder)


def test_none(folder):
    assert read_kv_scales(SafetensorsFolder(folder), 2) == ()


@pytest.mark.parametrize("value, words", [
    (torch.ones(2), "must be one number"), (torch.tensor(0.0), "positive number"), (torch.tensor(-1.0), "positive"),
    (torch.tensor(float("nan")), "positive number"), (torch.tensor(3, dtype=torch.int32), "must be one number"),
])  # fmt: skip
def test_what_is_no_scale_is_refused(value, words, folder):
    store(folder, {**named("{0}_scale"), ATTENTION.format(layer=1) + "v_scale": value})
    with pytest.raises(ConfigError, match=rf"layers\.1\.self_attn\.v_scale .*{words}"):
        read_kv_scales(SafetensorsFolder(folder), 2)


def test_scales_of_some_layers_are_refused(folder):
    tensors = named("{0}_scale")
    del tensors[ATTENTION.format(layer=1) + "k_scale"]
    store(folder, tensors)
    with pytest.raises(ConfigError, match="no k_scale of layer 1"):
        read_kv_scales(SafetensorsFolder(folder), 2)


SCHEME = {"num_bits": 8, "type": "float", "dynamic": False}


@pytest.mark.parametrize("quantization, is_served", [
    ({"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": SCHEME}, True),
    ({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME,
      "config_groups": {"group_0": {"targets": ["LlamaAttention"], "weights": None, "inputs": SCHEME}}}, True),
    ({"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": SCHEME}, True),
    ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": SCHEME}, False),
    ({"quant_method": "compressed-tensors", "kv_cache_scheme": SCHEME,
      "config_groups": {"group_0": {"targets": ["Linear"], "weights": SCHEME}}}, False),
    ({"quant_method": "compressed-tensors", "config_groups": {}}, False),
    ({"quant_method": "gptq", "kv_cache_scheme": SCHEME}, False),
    ({"quant_method": "compressed-tensors", "config_groups": None, "kv_cache_scheme": SCHEME}, True),
    ({"quant_method": "compressed-tensors", "config_groups": {"group_0": None}, "kv_cache_scheme": SCHEME}, True),
    ({"quant_method": "compressed-tensors", "config_groups": [SCHEME], "kv_cache_scheme": SCHEME}, False),
    ("fp8", False),
])  # fmt: skip
def test_a_config_that_quantises_the_cache_alone(quantization, is_served, folder):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": quantization}))
    if is_served:
        facts_of(folder)
    else:
        with pytest.raises(ConfigError, match="quantised checkpoints are not supported"):
            facts_of(folder)


def test_scales_take_no_part_in_the_size_of_the_weights(folder):
    before = facts_of(folder).weight_bytes
    store(folder, named("{0}_scale"))
    assert facts_of(folder).weight_bytes == before


def test_calibration_is_refused_without_an_fp8_cache():
    with pytest.raises(ConfigError, match="calculate_kv_scales needs kv_cache_dtype fp8, not auto"):
        EngineConfig.from_mapping({"model": "m", "calculate_kv_scales": True})
    EngineConfig.from_mapping({"model": "m", "calculate_kv_scales": True, "kv_cache_dtype": "fp8_e4m3"})
