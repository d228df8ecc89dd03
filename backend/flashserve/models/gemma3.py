"""Gemma 3's text models: windows in most layers, whose rotary embedding is another, four norms per layer, scaled
embeddings, and a gated unit with GELU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from flashserve.errors import ConfigError
from flashserve.layers.decoder_layer import DecoderLayer, PostNormed
from flashserve.layers.mlp import read_activation
from flashserve.layers.rotary import RopeSettings, read_rope_settings
from flashserve.layers.weight_source import WeightSource
from flashserve.models.decoder import Decoder, DecoderSpec

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


class Gemma3ForCausalLM(Decoder):
    """The decoder with norms also behind attention and feed-forward."""

    tied_by_default: ClassVar[bool] = True

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        if config.get("use_bidirectional_attention"):
            raise ConfigError("use_bidirectional_attention=true is not supported: the model generates no text")
        bias = config.get("attention_bias", False)
        rope, local_rope = _read_ropes(config)
        spec = DecoderSpec.read(
            config, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=_read_windows(config), rope=rope
        )
        activation = config.get("hidden_activation", "gelu_pytorch_tanh")
        return replace(
            spec,
            context_len=config["max_position_embeddings"],  # stated after any scaling
            tied_head=config.get("tie_word_embeddings", Gemma3ForCausalLM.tied_by_default),
            activation=read_activation("hidden_activation", activation),
            local_rope=local_rope,
            norm_offset=1.0,
            embedding_scale=spec.hidden_size**0.5,
            attention_scale=config.get("query_pre_attn_scalar", 256) ** -0.5,
            attention_softcap=config.get("attn_logit_softcapping"),
            logits_softcap=config.get("final_logit_softcapping"),
        )

    def make_layer(self, spec: DecoderSpec, weights: WeightSource, index: int) -> DecoderLayer:
        prefix, window = f"model.layers.{index}.", spec.windows[index]
        rotary = self.rotaries[0 if window is None else -1]
        attention = self.make_attention(spec, weights, f"{prefix}self_attn.", window=window, rotary=rotary)
        mlp = self.make_mlp(spec, weights, f"{prefix}mlp.")
        return DecoderLayer(
            self.make_norm(spec, weights, f"{prefix}input_layernorm"),
            PostNormed(attention, self.make_norm(spec, weights, f"{prefix}post_attention_layernorm")),
            self.make_norm(spec, weights, f"{prefix}pre_feedforward_layernorm"),
            PostNormed(mlp, self.make_norm(spec, weights, f"{prefix}post_feedforward_layernorm")),
        )


def _read_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """Of each layer: ``layer_types``, or every sixth (``sliding_window_pattern``) without one."""
    pattern, layers = config.get("sliding_window_pattern", 6), config["num_hidden_layers"]
    types = config.get("layer_types") or [_LOCAL if (index + 1) % pattern else _GLOBAL for index in range(layers)]
    return tuple(config["sliding_window"] if kind == _LOCAL else None for kind in types)


def _read_ropes(config: dict[str, Any]) -> tuple[RopeSettings, RopeSettings]:
    """Of layers that see everything and of those with a window: by kind in ``rope_parameters``, or from older keys."""
    given = config.get("rope_parameters") or {}
    parameters = (
        {"rope_theta": config.get("rope_theta", 1e6), **given.get(_GLOBAL, {}), **config.get("rope_scaling", {})},
        {"rope_theta": config.get("rope_local_base_freq", 1e4), **given.get(_LOCAL, {})},
    )
    everything, local = (read_rope_settings({**config, "rope_scaling": own}) for own in parameters)
    return everything, local
