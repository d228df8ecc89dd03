"""The shapes that gpu.py measures, as their config.json has them, and what a step of them costs at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
}
TINY_SHAPE = {
    **SHAPES["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def causal_flops(queries: int, context: int, heads: int, head_dim: int) -> float:
    """Multiplications and additions of attention's two products for the last ``queries`` of ``context`` tokens."""
    pairs = queries * (context - queries) + queries * (queries + 1) / 2
    return 4.0 * heads * head_dim * pairs


@dataclass(frozen=True)
class ModelCost:
    """What a step of a model must move and compute at least."""

    linear_params: int
    """Weights of all matrix products but the head's."""
    head_params: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bytes_per_weight: int = 2

    @classmethod
    def of(cls, config: dict[str, Any]) -> ModelCost:
        """From config.json of a Llama-like model."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        kv_heads = config["num_key_value_heads"]
        attention = hidden * head_dim * (heads + 2 * kv_heads) + heads * head_dim * hidden
        layer = attention + 3 * hidden * config["intermediate_size"]
        layers = config["num_hidden_layers"]
        return cls(layers * layer, config["vocab_size"] * hidden, layers, heads, kv_heads, head_dim)

    def decode_bytes(self, batch: int, context: int) -> float:
        """Weights once, keys and values of every row; activations are next to nothing."""
        cached = 2 * self.num_layers * self.num_kv_heads * self.head_dim * context * batch
        return float(self.bytes_per_weight * (self.linear_params + self.head_params + cached))

    def decode_flops(self, batch: int, context: int) -> float:
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * context
        return batch * (2.0 * (self.linear_params + self.head_params) + attention)

    def prefill_flops(self, rows: int, queries: int, context: int) -> float:
        """The head computes one token per row."""
        attention = self.num_layers * causal_flops(queries, context, self.num_heads, self.head_dim)
        return rows * (2.0 * self.linear_params * queries + 2.0 * self.head_params + attention)

    def decode_floor_s(self, batch: int, context: int, bandwidth: float, flops: float) -> float:
        """No step can be shorter than its memory traffic, nor than its arithmetic, at the measured ceilings."""
        return max(self.decode_bytes(batch, context) / bandwidth, self.decode_flops(batch, context) / flops)
