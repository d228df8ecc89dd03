"""Qwen 2 and 2.5: biases on query, key and value; the upper layers may have a sliding window."""

from __future__ import annotations

from typing import Any

from flashserve.models.decoder import Decoder, DecoderSpec


def read_windows(config: dict[str, Any]) -> tuple[int | None, ...]:
    """``layer_types`` says which layers slide; without it those from ``max_window_layers`` on."""
    layers = config["num_hidden_layers"]
    window = config.get("sliding_window") if config.get("use_sliding_window", False) else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in types)


class Qwen2ForCausalLM(Decoder):
    """The decoder with query, key and value biases."""

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        return DecoderSpec.read(config, qkv_bias=True, windows=read_windows(config))
