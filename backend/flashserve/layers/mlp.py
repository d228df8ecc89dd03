"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from flashserve.layers.linear import GatedLinear, Linear
from flashserve.layers.weight_source import WeightSource


class GatedMLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, weights: WeightSource, prefix: str, hidden_size: int, inner_size: int, bias: bool) -> None:
        self.gate_up_proj = GatedLinear(weights, prefix, hidden_size, ("gate_proj", "up_proj"), inner_size, bias)
        self.down_proj = Linear(weights, prefix, inner_size, [("down_proj", hidden_size)], bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down_proj(self.gate_up_proj(x))


class MLP:
    """Two linears with biases around a GELU, as in GPT-2; its checkpoints hold them transposed."""

    def __init__(self, weights: WeightSource, prefix: str, hidden_size: int, inner_size: int) -> None:
        self.up = Linear(weights, prefix, hidden_size, [("c_fc", inner_size)], bias=True, transposed=True)
        self._ops = weights.ops
        self.down = Linear(weights, prefix, inner_size, [("c_proj", hidden_size)], bias=True, transposed=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down(self._ops.gelu_tanh(self.up(x)))
