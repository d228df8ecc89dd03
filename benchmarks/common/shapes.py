"""Models of well-known shapes, as their config.json has them, and what a step of them costs at least. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COLUMNS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "rope_theta", "rms_norm_eps", "tie_word_embeddings",
)  # fmt: skip
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _shape(family: dict[str, Any], *values: Any, **others: Any) -> dict[str, Any]:
    return {**family, **dict(zip(COLUMNS, values, strict=True)), **others}


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-8b": _shape(QWEN3, 4096, 12288, 36, 32, 8, 128, 151936, 40960, 1000000.0, 1e-6, False),
    "llama-3.2-1b": _shape(
        LLAMA, 2048, 8192, 16, 32, 8, 64, 128256, 131072, 500000.0, 1e-5, True, rope_scaling=LLAMA3_SCALING
    ),
    "smollm2-135m": _shape(LLAMA, 576, 1536, 30, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, True),
    "tinyllama-1.1b": _shape(LLAMA, 2048, 5632, 22, 32, 4, 64, 32000, 2048, 10000.0, 1e-5, False),
}
TINY_SHAPE = {
    **SHAPES["smollm2-135m"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
}
GPU_SHAPES = ("qwen3-8b", "llama-3.2-1b", "smollm2-135m")
CPU_SHAPES = ("smollm2-135m", "tinyllama-1.1b")
"""Small enough to be made with random weights and run on a notebook."""


def head_size(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each matrix product of a layer as the engine joins them, and of the head."""
    hidden, wide, size = config["hidden_size"], config["intermediate_size"], head_size(config)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    return {
        "qkv": (hidden, size * (heads + 2 * kv_heads)),
        "o": (heads * size, hidden),
        "gate_up": (hidden, 2 * wide),
        "down": (wide, hidden),
        "head": (hidden, config["vocab_size"]),
    }


def causal_flops(queries: int, context: int, heads: int, head_dim: int) -> float:
    """Multiplications and additions of attention's two products for the last ``queries`` of ``context`` tokens."""
    pairs = queries * (context - queries) + queries * (queries + 1) / 2
    return 4.0 * heads * head_dim * pairs


@dataclass(frozen=True)
class ModelCost:
    """What a step of a model must move and compute at least, whatever the engine. Bandwidth in bytes, arithmetic in
    FLOP per second; no step can be shorter than its memory traffic, nor than its arithmetic."""

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
        products = {name: inputs * outputs for name, (inputs, outputs) in linear_shapes(config).items()}
        head, layers = products.pop("head"), config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        return cls(layers * sum(products.values()), head, layers, heads, kv_heads, head_size(config))

    @property
    def weight_bytes(self) -> int:
        """Matrices that every step reads; an input embedding that is not the head is not among them."""
        return self.bytes_per_weight * (self.linear_params + self.head_params)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.bytes_per_weight * 2 * self.num_layers * self.num_kv_heads * self.head_dim

    def decode_bytes(self, batch: int, context: int) -> float:
        """Weights once, keys and values of every row; activations are next to nothing."""
        return float(self.weight_bytes + batch * context * self.kv_bytes_per_token)

    def decode_flops(self, batch: int, context: int) -> float:
        attention = 4.0 * self.num_layers * self.num_heads * self.head_dim * context
        return batch * (2.0 * (self.linear_params + self.head_params) + attention)

    def prefill_flops(self, rows: int, queries: int, context: int) -> float:
        """The head computes one token per row."""
        attention = self.num_layers * causal_flops(queries, context, self.num_heads, self.head_dim)
        return rows * (2.0 * self.linear_params * queries + 2.0 * self.head_params + attention)

    def decode_floor_s(self, batch: int, context: int, bandwidth: float, flops: float) -> float:
        return max(self.decode_bytes(batch, context) / bandwidth, self.decode_flops(batch, context) / flops)

    def prefill_floor_s(self, requests: int, prompt: int, bandwidth: float, flops: float) -> float:
        """The prompts in as few steps as can be: bound by compute, or by one pass over the weights."""
        return max(self.prefill_flops(requests, prompt, prompt) / flops, self.weight_bytes / bandwidth)

    def tokens_per_s(self, requests: int, prompt: int, output: int, bandwidth: float, flops: float) -> float:
        """Output tokens of a whole batch, prompts included, at the ceilings."""
        steps = (self.decode_floor_s(requests, prompt + i, bandwidth, flops) for i in range(1, output))
        return requests * output / (self.prefill_floor_s(requests, prompt, bandwidth, flops) + sum(steps))
