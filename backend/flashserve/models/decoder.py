"""The decoder that Llama, Mistral, Qwen and Gemma share. Their files state what differs, as a :class:`DecoderSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.attention import Attention
from flashserve.layers.decoder_layer import DecoderLayer, DecoderStack
from flashserve.layers.embedding import load_embedding_and_head
from flashserve.layers.linear import Linear
from flashserve.layers.mlp import GatedMLP, read_activation
from flashserve.layers.norm import RMSNorm
from flashserve.layers.rotary import RopeSettings, RotaryEmbedding, read_rope_settings, scaled_context_len
from flashserve.layers.weight_source import WeightSource
from flashserve.models.model_input import ModelInput, ModelShape
from flashserve_kernels import Activation, CacheLayer


@dataclass(frozen=True)
class DecoderSpec:
    """Sizes and options of a decoder, read from config.json."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    norm_eps: float
    rope: RopeSettings
    context_len: int
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    """Per layer: tokens that a query sees, itself included; None: all earlier ones."""
    activation: Activation = "silu"
    local_rope: RopeSettings | None = None
    """Of layers with a window, where theirs is another."""
    norm_offset: float = 0.0
    """What the stored weights of norms lack."""
    embedding_scale: float = 1.0
    """What embedded tokens are multiplied with."""
    attention_scale: float | None = None
    """What scores are multiplied with; None: ``head_dim ** -0.5``."""
    attention_softcap: float | None = None
    """``c · tanh(score / c)``."""
    logits_softcap: float | None = None
    """``c · tanh(logit / c)``."""

    @classmethod
    def read(
        cls,
        config: dict[str, Any],
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        mlp_bias: bool = False,
        qk_norm: bool = False,
        windows: tuple[int | None, ...] | None = None,
        rope: RopeSettings | None = None,
    ) -> DecoderSpec:
        """The keys that all of these architectures share, and the options of one of them. Raises ConfigError for values
        that no layer implements."""
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        rope = rope or read_rope_settings(config)
        windows = windows or (None,) * layers
        if len(windows) != layers:
            raise ConfigError(f"config.json has {layers} layers, and layer_types for {len(windows)}")
        return cls(
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope,
            context_len=scaled_context_len(config, rope),
            tied_head=config.get("tie_word_embeddings", Decoder.tied_by_default),
            qkv_bias=qkv_bias,
            o_bias=o_bias,
            mlp_bias=mlp_bias,
            qk_norm=qk_norm,
            windows=windows,
            activation=read_activation("hidden_act", config.get("hidden_act", "silu")),
        )


class Decoder:
    """Pre-norm decoder: RMSNorm, rotary grouped-query attention, RMSNorm, gated feed-forward; twelve names of
    checkpoint tensors per layer. Implements CausalLM together with a subclass's ``read_spec``."""

    embedding_names: ClassVar[tuple[str, ...]] = ("model.embed_tokens.weight",)
    tied_by_default: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], weights: WeightSource, context_len: int) -> None:
        spec = self.read_spec(config)
        self.embed_tokens, self.lm_head = load_embedding_and_head(
            weights,
            "model.embed_tokens.weight",
            None if spec.tied_head else "lm_head.weight",
            spec.vocab_size,
            spec.hidden_size,
            scale=spec.embedding_scale,
            softcap=spec.logits_softcap,
        )
        self.rotaries = self.make_rotaries(spec, weights, context_len)
        layers = [self.make_layer(spec, weights, index) for index in range(spec.num_layers)]
        self.stack = DecoderStack(weights.ops, layers, self.make_norm(spec, weights, "model.norm"), self.rotaries)

    def make_rotaries(self, spec: DecoderSpec, weights: WeightSource, context_len: int) -> list[RotaryEmbedding]:
        """All that the model's layers use: the one of layers that see everything first, of those with a window last."""
        return [
            RotaryEmbedding(rope, spec.head_dim, context_len, weights.ops, weights.device)
            for rope in (spec.rope, spec.local_rope)
            if rope is not None
        ]

    def make_layer(self, spec: DecoderSpec, weights: WeightSource, index: int) -> DecoderLayer:
        """One layer with the usual names of its tensors."""
        prefix, window = f"model.layers.{index}.", spec.windows[index]
        rotary = self.rotaries[0 if window is None else -1]
        return DecoderLayer(
            self.make_norm(spec, weights, f"{prefix}input_layernorm"),
            self.make_attention(spec, weights, f"{prefix}self_attn.", window=window, rotary=rotary),
            self.make_norm(spec, weights, f"{prefix}post_attention_layernorm"),
            self.make_mlp(spec, weights, f"{prefix}mlp."),
        )

    @staticmethod
    def make_norm(spec: DecoderSpec, weights: WeightSource, name: str, size: int | None = None) -> RMSNorm:
        """size: None: of the hidden state."""
        return RMSNorm(weights, name, size or spec.hidden_size, spec.norm_eps, spec.norm_offset)

    @staticmethod
    def make_mlp(spec: DecoderSpec, weights: WeightSource, prefix: str) -> GatedMLP:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        return GatedMLP(weights, prefix, hidden, inner, spec.mlp_bias, spec.activation)

    @classmethod
    def make_attention(cls, spec: DecoderSpec, weights: WeightSource, prefix: str, **options: Any) -> Attention:
        """options: those of Attention that the spec does not say. Ranks share the heads."""
        hidden, head_dim, ranks = spec.hidden_size, spec.head_dim, weights.ranks
        q_size, kv_size = spec.num_heads * head_dim, spec.num_kv_heads * head_dim
        shards = [("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size)]
        norms = [cls.make_norm(spec, weights, f"{prefix}{name}_norm", head_dim) for name in "qk" if spec.qk_norm]
        q_norm, k_norm = norms or (None, None)
        return Attention(
            ops=weights.ops,
            qkv_proj=Linear(weights, prefix, hidden, shards, spec.qkv_bias, split="outputs"),
            o_proj=Linear(weights, prefix, q_size, [("o_proj", hidden)], spec.o_bias, split="inputs"),
            num_heads=ranks.share(spec.num_heads, "attention heads"),
            num_kv_heads=ranks.share(spec.num_kv_heads, "KV heads"),
            head_dim=head_dim,
            q_norm=q_norm,
            k_norm=k_norm,
            **{"scale": spec.attention_scale, "softcap": spec.attention_softcap, **options},
        )

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        raise NotImplementedError

    @classmethod
    def read_shape(cls, config: dict[str, Any]) -> ModelShape:
        spec = cls.read_spec(config)
        return ModelShape(
            spec.context_len, spec.vocab_size, spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.hidden_size
        )

    @classmethod
    def ignored_weights(cls, config: dict[str, Any]) -> tuple[str, ...]:
        tied = ("lm_head.weight",) if cls.read_spec(config).tied_head else ()
        return ("*.rotary_emb.inv_freq", *tied)

    def forward(self, inputs: ModelInput, kv_cache: Sequence[CacheLayer]) -> Tensor:
        x = self.embed_tokens(inputs.token_ids)
        return self.stack(x, inputs.positions, inputs.attention, inputs.logits_rows, kv_cache)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)
