"""The FP8 KV cache of a whole engine: its scales, and that rounding to e4m3 is all that it changes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from driver import Engine, SeenLogits, random_prompts
from flashserve.errors import ConfigError
from flashserve.runner.model_runner import ModelRunner
from flashserve_kernels.kv_cache import KVLayer
from flashserve_kernels.ops import Ops
from tiny_models import make_tiny_model

E4M3 = torch.float8_e4m3fn
LENGTHS = (3, 20)
NUM_TOKENS = 3
VOCAB_SIZE = 300


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def folder(request, tmp_path):
    """rope_and_cache, norm_rope_and_cache and write_kv."""
    return make_tiny_model(request.param, tmp_path, vocab_size=VOCAB_SIZE)


@pytest.fixture
def llama(tmp_path):
    return make_tiny_model("llama", tmp_path, vocab_size=VOCAB_SIZE)


@pytest.fixture
def start(load_on_kernels):
    return partial(load_on_kernels, max_num_batched_tokens=32)


def generate(runner: ModelRunner) -> tuple[list[list[int]], SeenLogits]:
    """Tokens of each prompt, and logits by (prompt, position)."""
    seen = SeenLogits(runner)
    prompts = random_prompts(LENGTHS, vocab_size=VOCAB_SIZE)
    return Engine(runner).generate(prompts, max_tokens=NUM_TOKENS), seen


def scales_of(runner) -> list[tuple[float, float]]:
    return [(layer.k_scale, layer.v_scale) for layer in runner.step_model.kv_cache]


def enlarge(folder, keys: float, values: float) -> None:
    """Keys and values that are larger by these factors in a model that computes the same."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        for projection, factor in (("k", keys), ("q", 1 / keys), ("v", values), ("o", 1 / values)):
            if f"self_attn.{projection}_proj" in name:
                weight.mul_(factor)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


class RoundedOps(Ops):
    """A float cache whose numbers are e4m3's times the scales: the torch reference of an FP8 cache."""

    def __init__(self, scales: dict[int, tuple[float, float]]) -> None:
        """scales: of keys and values, by the address of the layer's keys."""
        super().__init__(torch.device("cpu"))
        self.scales = scales

    def rope_and_cache(self, qkv, num_heads, cos_sin, cache, slot_mapping):
        queries = super().rope_and_cache(qkv, num_heads, cos_sin, cache, slot_mapping)
        self._round(cache)
        return queries

    def norm_rope_and_cache(self, qkv, num_heads, q_weight, k_weight, eps, cos_sin, cache, slot_mapping):
        weights = q_weight, k_weight, eps
        queries = super().norm_rope_and_cache(qkv, num_heads, *weights, cos_sin, cache, slot_mapping)
        self._round(cache)
        return queries

    def write_kv(self, k, v, cache, slot_mapping):
        super().write_kv(k, v, cache, slot_mapping)
        self._round(cache)

    def _round(self, cache: KVLayer) -> None:
        for stored, scale in zip((cache.k, cache.v), self.scales[cache.k.data_ptr()], strict=True):
            stored.copy_((stored / scale).clamp(-448, 448).to(E4M3).float() * scale)


def test_rounding_to_e4m3_is_all_that_differs(folder, start):
    """Against a float cache that is rounded so, the logits are the same; against one that is not, they differ by about
    what 4 significant bits explain: a number by 2^-4 at most, and keys and values in each of two layers."""
    runner, plain = start(folder, kv_cache_dtype="fp8"), start(folder)
    tokens, logits = generate(runner)
    _, exact = generate(plain)
    caches = (layer.k.data_ptr() for layer in plain.step_model.kv_cache)
    _swap_ops(plain, RoundedOps(dict(zip(caches, scales_of(runner), strict=True))))
    rounded_tokens, rounded = generate(plain)
    assert rounded_tokens == tokens
    for at, row in logits.items():
        torch.testing.assert_close(row, rounded[at], rtol=1e-4, atol=1e-4)
    for at in ((index, length - 1) for index, length in enumerate(LENGTHS)):  # behind them the tokens may differ
        assert 0 < (logits[at] - exact[at]).norm() / exact[at].norm() < 4 * 2**-4


def _swap_ops(runner, ops: Ops) -> None:
    """Attention's keys and values through other ops."""
    for layer in runner.step_model.model.stack._layers:
        object.__setattr__(layer._attention, "ops", ops)


@pytest.mark.parametrize("keys, values", [(2.0**9, 2.0**12), (2.0**-3, 2.0**-3)])
def test_any_size_of_keys_and_values_is_stored_alike(keys, values, llama, start):
    """By powers of two, so that nothing else is rounded otherwise: the logits are those of the model as it was, to the
    bit. With scales of 1 what is beyond 448 would be cut."""
    before = start(llama, kv_cache_dtype="fp8")
    _, expected = generate(before)
    enlarge(llama, keys, values)
    runner = start(llama, kv_cache_dtype="fp8")
    _, logits = generate(runner)
    assert scales_of(runner) == [(k * keys, v * values) for k, v in scales_of(before)]
    assert logits.keys() == expected.keys() and all(torch.equal(logits[at], expected[at]) for at in logits)


def test_calibration_leaves_room(llama, start):
    """8 to 16 times the largest key and value of a random prompt, in powers of two."""
    enlarge(llama, 50.0, 100.0)
    scales = scales_of(start(llama, kv_cache_dtype="fp8"))
    plain = start(llama)
    generate(plain)
    for both, layer in zip(scales, plain.step_model.kv_cache, strict=True):
        for scale, stored in zip(both, (layer.k, layer.v), strict=True):
            assert math.frexp(scale)[0] == 0.5
            assert 4 < 448 * scale / float(stored.abs().max()) < 32  # these prompts' largest are not quite that one's
    assert scales_of(start(llama, kv_cache_dtype="fp8")) == scales, "the same at each start"


def test_small_keys_and_values_keep_some_room(llama, start):
    enlarge(llama, 2.0**-20, 2.0**-20)
    assert scales_of(start(llama, kv_cache_dtype="fp8")) == [(2.0**-6, 2.0**-6)] * 2


def test_the_start_line_names_the_scales(llama, start):
    runner = start(llama, kv_cache_dtype="fp8")
    (k_least, k_most), (v_least, v_most) = (sorted(kind) for kind in zip(*scales_of(runner), strict=True))
    found = f"FP8 KV scales calibrated: keys {k_least:.3g} to {k_most:.3g}, values {v_least:.3g} to {v_most:.3g}"
    assert found in runner.resolved.summary()
    assert "scales" not in start(llama).resolved.summary()


def test_a_checkpoints_scales_come_first(llama, start):
    own = [(0.5, 3.0), (0.75, 0.0625)]
    calibrated = scales_of(start(llama, kv_cache_dtype="fp8"))
    weights = load_file(llama / "model.safetensors")
    for layer, (k_scale, v_scale) in enumerate(own):
        weights[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor(k_scale)
        weights[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor(v_scale)
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    runner = start(llama, kv_cache_dtype="fp8")
    assert scales_of(runner) == own != calibrated
    assert "FP8 KV scales of the checkpoint: keys 0.5 to 0.75, values 0.0625 to 3" in runner.resolved.summary()
    assert scales_of(start(llama, kv_cache_dtype="fp8", calculate_kv_scales=True)) == calibrated


def test_a_model_that_does_not_compute_is_refused(llama, start):
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="keys or values of layer 1 are not finite in float32"):
        start(llama, kv_cache_dtype="fp8")
