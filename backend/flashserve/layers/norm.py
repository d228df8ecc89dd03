"""Norms with their weights. Each can take the residual add before it along."""

from __future__ import annotations

from torch import Tensor

from flashserve.layers.weight_source import WeightSource


class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, weights: WeightSource, prefix: str, size: int, eps: float, offset: float = 0.0) -> None:
        """offset: what stored weights lack, 1 in Gemma. The sum is float32, since bfloat16 would round it."""
        self.weight = weights.read(f"{prefix}.weight", (size,))
        if offset:
            self.weight = self.weight.float().add_(offset)
        self.eps = eps
        self._ops = weights.ops

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x: [..., size]; ``out`` may be x itself."""
        return self._ops.rms_norm(x, self.weight, self.eps, out)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); both may be overwritten."""
        return self._ops.add_rms_norm(x, residual, self.weight, self.eps)


class LayerNorm:
    """Layer norm over the last dimension."""

    def __init__(self, weights: WeightSource, prefix: str, size: int, eps: float) -> None:
        self.weight = weights.read(f"{prefix}.weight", (size,))
        self.bias = weights.read(f"{prefix}.bias", (size,))
        self.eps = eps
        self._ops = weights.ops

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); both may be overwritten."""
        return self._ops.add_layer_norm(x, residual, self.weight, self.bias, self.eps)
