"""Scales of an FP8 KV cache that a checkpoint brings: what stored keys and values are multiplied with."""

from __future__ import annotations

import math
from typing import Any

from flashserve.errors import ConfigError
from flashserve.models.files import ModelFiles
from flashserve_kernels import KVScales

# {0} is k or v. As llm-compressor writes them now and wrote them once, ModelOpt, vLLM's own names, and one for both.
_SPELLINGS = (
    "{0}_scale",
    "{0}_proj.output_scale",
    "{0}_proj.{0}_scale",
    "attn.{0}_scale",
    "qkv_proj.{0}_scale",
    "kv_scale",
)
CACHE_SCALES = (
    *(f"*.self_attn.{spelling.format(kind)}" for kind in "kv" for spelling in _SPELLINGS),
    *("*.self_attn.q_scale", "*.self_attn.attn.q_scale", "*.self_attn.q_proj.q_scale"),  # queries stay as they are
)
"""Patterns (fnmatch) of tensors that say how to store keys and values, and are no weights."""


def read_kv_scales(files: ModelFiles, num_layers: int) -> tuple[KVScales, ...]:
    """Of each layer; empty where the checkpoint has none.

    Raises ConfigError where only some are there, and for what is no positive number.
    """
    found = {
        (layer, kind): _read(files, f"model.layers.{layer}.self_attn.", kind)
        for layer in range(num_layers)
        for kind in "kv"
    }
    missing = [f"{kind}_scale of layer {layer}" for (layer, kind), scale in found.items() if scale is None]
    if len(missing) == len(found):
        return ()
    if missing:
        raise ConfigError(f"the weights have scales for the KV cache, but no {missing[0]} ({len(missing)} are missing)")
    return tuple(KVScales(found[layer, "k"] or 1.0, found[layer, "v"] or 1.0) for layer in range(num_layers))


def _read(files: ModelFiles, prefix: str, kind: str) -> float | None:
    for spelling in _SPELLINGS:
        name = prefix + spelling.format(kind)
        scale = files.read_number(name)
        if scale is not None:
            if not (scale > 0 and math.isfinite(scale)):
                raise ConfigError(f"tensor {name} must be a positive number, not {scale}")
            return scale
    return None


def quantizes_weights(quantization: Any) -> bool:
    """Whether config.json's quantization_config is about more than the KV cache, as llm-compressor and ModelOpt
    write it. What is of no form of theirs is."""
    if not isinstance(quantization, dict) or quantization.get("quant_method") not in ("compressed-tensors", "modelopt"):
        return True
    groups = quantization.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        return True
    of_weights = any(group.get("weights") for group in groups.values())
    return of_weights or bool(quantization.get("quant_algo")) or "kv_cache_scheme" not in quantization
