"""Weights in groups: native steps give what torch gives with the same quantised activations."""

from __future__ import annotations

import pytest
import torch

from flashserve.config import QUANTIZATIONS
from flashserve.layers.weight_format import WEIGHT_FORMATS
from flashserve.runner.device import CpuDevice
from flashserve_kernels import Ops
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.linear import PackedLinear
from flashserve_kernels.cpu.ops import NativeOps
from flashserve_kernels.grouped import Grouped, linear
from gguf_writer import write_model
from tiny_models import make_tiny_model

TYPES = {
    "token_embd": "Q8_0", "attn_q": "Q4_1", "attn_k": "Q8_0", "attn_v": "Q5_1", "attn_output": "Q4_0",
    "ffn_gate": "Q5_0", "ffn_up": "Q4_0", "ffn_down": "Q4_1",
}  # fmt: skip
"""Shards of several types in one linear; output.weight, if there is one, stays as it is."""


class GroupedOps(Ops):
    """Weights in groups in torch."""

    weight_formats = frozenset({"grouped"})

    def pack_linear(self, weight, *, gated=False, int8=False):
        return super().pack_linear(weight) if isinstance(weight, torch.Tensor) else weight.rows(0, weight.shape[0])

    def linear(self, x, weight, bias=None):
        if not isinstance(weight, Grouped):
            return super().linear(x, weight, bias)
        return (linear(x, weight) + (0 if bias is None else bias)).to(x.dtype)

    def packed_embedding(self, weight, ids, dtype, scale=1.0):
        return (weight.dequantize()[ids] * scale).to(dtype)


class GroupedDevice(CpuDevice):
    def select_ops(self, config, head_dim):
        return GroupedOps(torch.device("cpu"))


@pytest.fixture(params=["llama", "qwen2", "gpt2", "tied"])
def file(request, tmp_path):
    tied = {"tie_word_embeddings": True} if request.param == "tied" else {}
    folder = make_tiny_model("llama" if tied else request.param, tmp_path / "folder", **tied)
    return write_model(folder, tmp_path / "model.gguf", quantize=TYPES)


@pytest.fixture
def packed(monkeypatch):
    """What native ops have made of weights."""
    made, pack = [], NativeOps.pack_linear

    def pack_and_keep(*arguments, **options):
        made.append(pack(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(NativeOps, "pack_linear", pack_and_keep)
    return made


@pytest.mark.parametrize("isa", supported_isas())
def test_tokens_are_those_of_torch(isa, file, drive, monkeypatch, random_prompts, packed):
    monkeypatch.setenv("FLASHSERVE_KERNELS", f"native:{isa}")
    native = drive(file, dtype="float32")
    in_torch = drive(file, dtype="float32", device=GroupedDevice())
    assert sum(isinstance(one, PackedLinear) for one in packed) <= 1  # a head of its own
    prompts = random_prompts((1, 5, 40))
    assert native.generate(prompts, 12) == in_torch.generate(prompts, 12)


def test_full_weights_where_asked_for_or_groups_are_not_taken(file, drive, monkeypatch, random_prompts, packed):
    full = drive(file, dtype="float32", quantization="dense")
    assert packed and all(isinstance(one, PackedLinear) for one in packed)
    monkeypatch.setenv("FLASHSERVE_KERNELS", "torch")
    prompts = random_prompts((1, 5, 40))
    assert full.generate(prompts, 12) == drive(file, dtype="float32").generate(prompts, 12)


def test_a_tied_table_is_in_memory_once(tmp_path, drive, packed):
    folder = make_tiny_model("llama", tmp_path / "folder", tie_word_embeddings=True)
    vocab_size = drive(write_model(folder, tmp_path / "model.gguf", quantize=TYPES)).resolved.model.vocab_size
    assert [one.n for one in packed].count(vocab_size) == 1


def test_each_value_of_quantization_has_its_format():
    assert set(WEIGHT_FORMATS) == {None, *QUANTIZATIONS}
