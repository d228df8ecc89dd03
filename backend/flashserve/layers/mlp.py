"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.linear import GatedLinear, Linear
from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import Activation

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
"""Transformers' names: three are one formula, written differently."""


def read_activation(key: str, name: str) -> Activation:
    """The activation that config.json's ``key`` names. Raises ConfigError for one that there is not."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"{key}={name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class GatedMLP:
    """A gated unit and a projection back: ``down(activation(gate(x)) * up(x))``, split over ranks by inner features."""

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        hidden_size: int,
        inner_size: int,
        bias: bool,
        activation: Activation = "silu",
    ) -> None:
        names = "gate_proj", "up_proj"
        self.gate_up_proj = GatedLinear(
            weights, prefix, hidden_size, names, inner_size, bias, activation, split="outputs"
        )
        self.down_proj = Linear(weights, prefix, inner_size, [("down_proj", hidden_size)], bias, split="inputs")

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down_proj(self.gate_up_proj(x))


class MLP:
    """Two linears with biases around an activation, as in GPT-2; its checkpoints hold them transposed."""

    def __init__(
        self, weights: WeightSource, prefix: str, hidden_size: int, inner_size: int, activation: Activation
    ) -> None:
        self.up = Linear(weights, prefix, hidden_size, [("c_fc", inner_size)], bias=True, transposed=True)
        self._activation: Activation = activation
        self._ops = weights.ops
        self.down = Linear(weights, prefix, inner_size, [("c_proj", hidden_size)], bias=True, transposed=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down(self._ops.activate(self.up(x), self._activation))
