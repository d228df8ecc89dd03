"""Activations of the feed-forward layers by name, and the soft cap of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh", "gelu"]
"""SiLU (Elfwing et al., 2017); GELU (Hendrycks and Gimpel, 2016) in its tanh form, and with the error function."""


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": _gelu_tanh, "gelu": F.gelu}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Any shape. Raises ValueError for a name that is no activation's."""
    if activation not in _FUNCTIONS:
        raise ValueError(f"no activation {activation!r}; there are {', '.join(_FUNCTIONS)}")
    return _FUNCTIONS[activation](x)


def activate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """``activation(gate) * up`` (Shazeer, 2020). gate_up: [T, 2 I], gate first. Returns [T, I]."""
    half = gate_up.shape[-1] // 2
    return activate(gate_up[:, :half], activation).mul_(gate_up[:, half:])


def soft_cap_(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)`` in place. Any shape. Returns x."""
    return x.div_(cap).tanh_().mul_(cap)
