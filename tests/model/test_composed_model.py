"""A family with what no other has is one file and one line: it composes layers that are there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flashserve.layers.decoder_layer import DecoderLayer, PostNormed
from flashserve.layers.mlp import GatedMLP
from flashserve.layers.norm import RMSNorm
from flashserve.layers.rotary import RotaryEmbedding
from flashserve.models.decoder import Decoder, DecoderSpec
from flashserve.models.registry import ARCHITECTURES
from memory_files import MemoryFiles

LOCAL_THETA, SOFTCAP, SCALE = 100.0, 1.5, 0.4
HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB, LAYERS, EPS = 48, 80, 4, 2, 16, 300, 4, 1e-5
CONFIG = {
    "architectures": ["ToyForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM, "vocab_size": VOCAB,
    "rms_norm_eps": EPS, "rope_theta": 10000.0, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


# --- the file of the family ----------------------------------------------------------------------------------


class ToyForCausalLM(Decoder):
    """Two rotary embeddings in turn, capped scores of another scale, four norms per layer, scaled embeddings."""

    @staticmethod
    def read_spec(config):
        return replace(DecoderSpec.read(config), embedding_scale=config["hidden_size"] ** 0.5)

    def make_rotaries(self, spec, weights, context_len):
        local = replace(spec.rope, theta=LOCAL_THETA)
        own = RotaryEmbedding(local, spec.head_dim, context_len, weights.ops, weights.device)
        return [*super().make_rotaries(spec, weights, context_len), own]

    def make_layer(self, spec, weights, index):
        prefix = f"model.layers.{index}."

        def norm(name):
            return RMSNorm(weights, prefix + name, spec.hidden_size, spec.norm_eps)

        rotary = self.rotaries[index % 2]
        attention = self.make_attention(
            spec, weights, f"{prefix}self_attn.", rotary=rotary, softcap=SOFTCAP, scale=SCALE
        )
        mlp = GatedMLP(weights, f"{prefix}mlp.", spec.hidden_size, spec.intermediate_size, bias=False)
        return DecoderLayer(
            norm("norm_1"), PostNormed(attention, norm("norm_2")), norm("norm_3"), PostNormed(mlp, norm("norm_4"))
        )


# --- what it should compute ----------------------------------------------------------------------------------


def rotate(x, theta):
    """x: [T, heads, DIM]."""
    frequencies = theta ** (-torch.arange(0, DIM, 2) / DIM)
    angles = torch.outer(torch.arange(len(x)), frequencies)[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def reference_logits(weights, token_ids):
    """The model in a few lines of torch, all positions at once: [T, V]."""

    def norm(x, name):
        return F.rms_norm(x, (HIDDEN,), weights[f"{name}.weight"], EPS)

    x = weights["model.embed_tokens.weight"][token_ids] * math.sqrt(HIDDEN)
    hidden_from = torch.ones(len(token_ids), len(token_ids)).triu(1).bool()
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        theta = LOCAL_THETA if index % 2 else CONFIG["rope_theta"]
        y = norm(x, f"{prefix}norm_1")
        q, k, v = ((y @ weights[f"{prefix}self_attn.{n}_proj.weight"].T).view(len(y), -1, DIM) for n in "qkv")
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = SOFTCAP * torch.tanh(torch.einsum("qhd,khd->hqk", q, k) * SCALE / SOFTCAP)
        y = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden_from, -math.inf).softmax(-1), v).flatten(1)
        x = x + norm(y @ weights[f"{prefix}self_attn.o_proj.weight"].T, f"{prefix}norm_2")
        y = norm(x, f"{prefix}norm_3")
        gate, up = (y @ weights[f"{prefix}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + norm((F.silu(gate) * up) @ weights[f"{prefix}mlp.down_proj.weight"].T, f"{prefix}norm_4")
    return norm(x, "model.norm") @ weights["model.embed_tokens.weight"].T


def random_weights():
    generator = torch.Generator().manual_seed(3)

    def of(*shape):
        spread = 1.0 if len(shape) == 1 else shape[-1] ** -0.5
        return torch.randn(*shape, generator=generator) * spread

    weights = {"model.embed_tokens.weight": of(VOCAB, HIDDEN), "model.norm.weight": 1 + 0.2 * of(HIDDEN)}
    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        weights |= {f"{prefix}norm_{number}.weight": 4 + of(HIDDEN) for number in (1, 2, 3, 4)}
        sizes = {"q": HEADS * DIM, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM}
        weights |= {f"{prefix}self_attn.{name}_proj.weight": of(size, HIDDEN) for name, size in sizes.items()}
        weights[f"{prefix}self_attn.o_proj.weight"] = of(HIDDEN, HEADS * DIM)
        weights |= {f"{prefix}mlp.{name}_proj.weight": of(INNER, HIDDEN) for name in ("gate", "up")}
        weights[f"{prefix}mlp.down_proj.weight"] = of(HIDDEN, INNER)
    return weights


@pytest.mark.parametrize("kernels", ["", "torch"])
def test_its_tokens_are_those_of_a_plain_implementation(kernels, drive, random_prompts, monkeypatch):
    monkeypatch.setenv("FLASHSERVE_KERNELS", kernels)
    monkeypatch.setitem(ARCHITECTURES, "ToyForCausalLM", ToyForCausalLM)
    weights, prompts = random_weights(), random_prompts((3, 20, 45), vocab_size=VOCAB)
    driver = drive(files=MemoryFiles(dict(CONFIG), weights), dtype="float32")
    for prompt, tokens in zip(prompts, driver.generate(prompts, 8, max_chunk=16), strict=True):
        logits = reference_logits(weights, torch.tensor([*prompt, *tokens]))[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-3  # far more than float32's rounding
        assert len(set(tokens)) > 1
