"""GPT-2, and so DialoGPT: learned positions, LayerNorm, biases everywhere, weights stored transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.attention import Attention
from flashserve.layers.decoder_layer import DecoderLayer, DecoderStack
from flashserve.layers.embedding import load_embedding_and_head, load_table
from flashserve.layers.linear import Linear
from flashserve.layers.mlp import MLP, read_activation
from flashserve.layers.norm import LayerNorm
from flashserve.layers.weight_source import WeightSource
from flashserve.models.model_input import ModelInput, ModelShape
from flashserve_kernels import Activation, CacheLayer


class GPT2LMHeadModel:
    """Implements CausalLM."""

    embedding_names: ClassVar[tuple[str, ...]] = ("transformer.wte.weight", "wte.weight")
    tied_by_default: ClassVar[bool] = True

    def __init__(self, config: dict[str, Any], weights: WeightSource, context_len: int) -> None:
        hidden, eps = config["n_embd"], config.get("layer_norm_epsilon", 1e-5)
        prefix = "transformer." if weights.has("transformer.wte.weight") else ""
        head_name = None if _is_tied(config) else "lm_head.weight"
        self.tokens, self.lm_head = load_embedding_and_head(
            weights, f"{prefix}wte.weight", head_name, config["vocab_size"], hidden
        )
        self.positions = load_table(weights, f"{prefix}wpe.weight", config["n_positions"], hidden)
        layers = [_make_layer(config, weights, f"{prefix}h.{i}.", eps) for i in range(config["n_layer"])]
        self.stack = DecoderStack(weights.ops, layers, LayerNorm(weights, f"{prefix}ln_f", hidden, eps))

    @staticmethod
    def read_shape(config: dict[str, Any]) -> ModelShape:
        _activation(config)
        for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
            if config.get(option):
                raise ConfigError(f"{option}=true is not supported")
        if config.get("scale_attn_weights") is False:
            raise ConfigError("scale_attn_weights=false is not supported")
        heads = config["n_head"]
        return ModelShape(
            context_len=config["n_positions"],
            vocab_size=config["vocab_size"],
            num_layers=config["n_layer"],
            num_kv_heads=heads,
            head_dim=config["n_embd"] // heads,
            hidden_size=config["n_embd"],
        )

    @staticmethod
    def ignored_weights(config: dict[str, Any]) -> tuple[str, ...]:
        # The causal masks were buffers once and lie in old checkpoints.
        return ("*h.*.attn.bias", "*h.*.attn.masked_bias", *(("lm_head.weight",) if _is_tied(config) else ()))

    def forward(self, inputs: ModelInput, kv_cache: Sequence[CacheLayer]) -> Tensor:
        x = self.positions.add_(self.tokens(inputs.token_ids), inputs.positions)
        return self.stack(x, inputs.positions, inputs.attention, inputs.logits_rows, kv_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)


def _make_layer(config: dict[str, Any], weights: WeightSource, prefix: str, eps: float) -> DecoderLayer:
    hidden, heads = config["n_embd"], config["n_head"]
    inner = config.get("n_inner") or 4 * hidden
    attention = f"{prefix}attn."
    return DecoderLayer(
        LayerNorm(weights, f"{prefix}ln_1", hidden, eps),
        Attention(
            ops=weights.ops,
            qkv_proj=Linear(weights, attention, hidden, [("c_attn", 3 * hidden)], bias=True, transposed=True),
            o_proj=Linear(weights, attention, hidden, [("c_proj", hidden)], bias=True, transposed=True),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=hidden // heads,
        ),
        LayerNorm(weights, f"{prefix}ln_2", hidden, eps),
        MLP(weights, f"{prefix}mlp.", hidden, inner, _activation(config)),
    )


def _activation(config: dict[str, Any]) -> Activation:
    return read_activation("activation_function", config.get("activation_function", "gelu_new"))


def _is_tied(config: dict[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", GPT2LMHeadModel.tied_by_default))
