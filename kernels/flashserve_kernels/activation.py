"""Activations of the feed-forward layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's ``silu(gate) * up`` (Shazeer, 2020). gate_up: [T, 2 I], gate first. Returns [T, I]."""
    half = gate_up.shape[-1] // 2
    return F.silu(gate_up[:, :half]).mul_(gate_up[:, half:])


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, which GPT-2 was trained with (Hendrycks and Gimpel, 2016). Any shape."""
    return F.gelu(x, approximate="tanh")
