"""Llama 2 and 3, and the models that share their architecture: SmolLM2, TinyLlama, …"""

from __future__ import annotations

from typing import Any

from flashserve.models.decoder import Decoder, DecoderSpec


class LlamaForCausalLM(Decoder):
    """The plain decoder; some descendants have biases."""

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        bias = config.get("attention_bias", False)
        return DecoderSpec.read(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.get("mlp_bias", False))
