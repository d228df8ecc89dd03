"""Rotary positions: the frequency table with its scalings for longer contexts.

Formulas are those of transformers' ``modeling_rope_utils`` (the models were trained or tuned with them).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve_kernels import Ops

log = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "factors")
KNOWN_PARAMETERS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
        *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor"),
        *("mscale", "mscale_all_dim", "factors"),
    )
)


@dataclass(frozen=True)
class RopeSettings:
    """What a checkpoint's config.json says about rotary positions."""

    theta: float
    rope_type: str
    parameters: Mapping[str, Any]
    """The scaling's own numbers: factor, low_freq_factor, …"""
    trained_len: int
    """Positions that the model was trained with before any scaling."""


def read_rope_settings(config: Mapping[str, Any]) -> RopeSettings:
    """From ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``, which newer checkpoints have instead.

    Where there are both, ``rope_scaling`` comes first, as in transformers: people add it to make a context longer.
    Raises ConfigError for a rope type that is not implemented.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ConfigError(f"rope type {rope_type!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    partial = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial} is not supported; only 1.0 is")
    unknown = sorted(parameters.keys() - KNOWN_PARAMETERS)
    if unknown:
        log.warning("config.json's rope settings hold %s, which is not known and has no effect", ", ".join(unknown))
    if rope_type not in ("default", "factors") and "factor" not in parameters:
        raise ConfigError(f"rope type {rope_type!r} needs a factor in config.json")
    if rope_type == "factors" and "factors" not in parameters:
        raise ConfigError("rope type 'factors' needs factors, one for each pair of a head")
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    trained = parameters.get("original_max_position_embeddings") or config["max_position_embeddings"]
    return RopeSettings(theta, rope_type, parameters, int(trained))


def scaled_context_len(config: Mapping[str, Any], rope: RopeSettings) -> int:
    """Positions the model can use. config.json states them before linear and yarn scaling, after llama3's."""
    stated = int(config["max_position_embeddings"])
    if rope.rope_type == "linear":
        return int(stated * rope.parameters["factor"])
    if rope.rope_type == "yarn":
        return max(stated, int(rope.trained_len * rope.parameters["factor"]))
    return stated


class RotaryEmbedding:
    """Cosines and sines of all positions, looked up once per step for all layers."""

    def __init__(self, rope: RopeSettings, head_dim: int, num_positions: int, ops: Ops, device: torch.device) -> None:
        self._ops = ops
        frequencies, magnitude = _frequencies(rope, head_dim)
        angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
        self._cos_sin = (torch.cat((angles.cos(), angles.sin()), -1) * magnitude).to(device)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions: [T] int64. Returns [T, head_dim] float32: half cosines, half sines."""
        return self._ops.embedding(self._cos_sin, positions)


def _frequencies(rope: RopeSettings, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each pair [head_dim / 2], and what cosines and sines are multiplied with."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    plain = 1.0 / (rope.theta**exponents)
    if rope.rope_type == "linear":
        return plain / rope.parameters["factor"], 1.0
    if rope.rope_type == "factors":  # one for each pair, as GGUF files have Llama 3.1's scaling
        return plain / torch.tensor(rope.parameters["factors"]), 1.0
    if rope.rope_type == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.rope_type == "yarn":
        return _yarn(plain, rope, head_dim)
    return plain, 1.0


def _llama3(plain: Tensor, rope: RopeSettings) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by the factor, short ones kept, those between blended."""
    factor = rope.parameters["factor"]
    low, high = rope.parameters["low_freq_factor"], rope.parameters["high_freq_factor"]
    wavelengths = 2 * math.pi / plain
    smooth = ((rope.trained_len / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * plain / factor + smooth * plain


def _yarn(plain: Tensor, rope: RopeSettings, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023): interpolate pairs that turn less than beta_slow times within the trained length,
    keep those that turn more than beta_fast times, and sharpen attention."""
    p = rope.parameters
    factor = p["factor"]

    def pair_that_turns(times: float) -> float:
        return head_dim * math.log(rope.trained_len / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_that_turns(p.get("beta_fast") or 32), pair_that_turns(p.get("beta_slow") or 1)
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    frequencies = plain / factor * interpolated + plain * (1 - interpolated)

    def mscale(scale: float, m: float = 1.0) -> float:
        return 0.1 * m * math.log(scale) + 1.0 if scale > 1 else 1.0

    magnitude = p.get("attention_factor")
    if magnitude is None:
        both = p.get("mscale") and p.get("mscale_all_dim")
        magnitude = mscale(factor, p["mscale"]) / mscale(factor, p["mscale_all_dim"]) if both else mscale(factor)
    return frequencies, float(magnitude)
