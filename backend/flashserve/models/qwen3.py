"""Qwen 3: queries and keys are normed per head before the rotation."""

from __future__ import annotations

from typing import Any

from flashserve.models.decoder import Decoder, DecoderSpec
from flashserve.models.qwen2 import read_windows


class Qwen3ForCausalLM(Decoder):
    """The decoder with query and key norms."""

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        bias = config.get("attention_bias", False)
        return DecoderSpec.read(config, qkv_bias=bias, o_bias=bias, qk_norm=True, windows=read_windows(config))
