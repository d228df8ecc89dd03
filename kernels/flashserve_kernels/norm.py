"""RMSNorm and LayerNorm over the last dimension, alone or fused with the residual add before them.

Statistics are float32 in every dtype (torch's own norms do the same).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` (Zhang and Sennrich, 2019).

    x: [..., D], any strides; weight: [D], x's dtype or float32; out: like x, may be x itself. Returns out, or a new
    tensor.
    """
    # torch's own takes one dtype only.
    result = F.rms_norm(x.to(weight.dtype), weight.shape, weight, eps).to(x.dtype)
    return result if out is None else out.copy_(result)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum of a block's output and its residual, normed for the next block: (rms_norm(x + r), x + r).

    x, residual: [T, D]; x is overwritten with the sum, which is the second result.
    """
    total = x.add_(residual)
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al., 2016). x: [..., D]; weight, bias: [D]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`add_rms_norm`, with LayerNorm."""
    total = x.add_(residual)
    return F.layer_norm(total, weight.shape, weight, bias, eps), total
