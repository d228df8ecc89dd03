"""Mistral: Llama with a sliding window in every layer (7B v0.1; later ones have none)."""

from __future__ import annotations

from typing import Any

from flashserve.models.decoder import Decoder, DecoderSpec


class MistralForCausalLM(Decoder):
    """The plain decoder with windows."""

    @staticmethod
    def read_spec(config: dict[str, Any]) -> DecoderSpec:
        windows = (config.get("sliding_window"),) * config["num_hidden_layers"]
        return DecoderSpec.read(config, windows=windows)
