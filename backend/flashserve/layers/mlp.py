"""Feed-forward layers."""

from __future__ import annotations

from torch import Tensor

from flashserve.layers.linear import Linear
from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import gelu_tanh, silu_and_mul


class GatedMLP:
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, weights: WeightSource, prefix: str, hidden_size: int, inner_size: int, bias: bool) -> None:
        shards = [("gate_proj", inner_size), ("up_proj", inner_size)]
        self.gate_up_proj = Linear(weights, prefix, hidden_size, shards, bias)
        self.down_proj = Linear(weights, prefix, inner_size, [("down_proj", hidden_size)], bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down_proj(silu_and_mul(self.gate_up_proj(x)))


class MLP:
    """Two linears with biases around a GELU, as in GPT-2; its checkpoints hold them transposed."""

    def __init__(self, weights: WeightSource, prefix: str, hidden_size: int, inner_size: int) -> None:
        self.up = Linear(weights, prefix, hidden_size, [("c_fc", inner_size)], bias=True, transposed=True)
        self.down = Linear(weights, prefix, inner_size, [("c_proj", hidden_size)], bias=True, transposed=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        return self.down(gelu_tanh(self.up(x)))
