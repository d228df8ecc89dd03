"""Counter-based noise: a pure function of (seed, position, token), the same on every device and in every batch.

Each (seed, position) gives a 64-bit key by SplitMix64's finaliser (Steele et al., 2014); the key's halves and
the token id go through a 32-bit finaliser (lowbias32, Wellons 2018) twice. Integer arithmetic wraps, so the bits
are equal wherever it runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def _as_signed(value: int, bits: int) -> int:
    """The two's-complement reading of an unsigned constant, which is what torch's integers need."""
    return value - (1 << bits) if value >= 1 << (bits - 1) else value


_GOLDEN = _as_signed(0x9E3779B97F4A7C15, 64)
_SPLITMIX_1 = _as_signed(0xBF58476D1CE4E5B9, 64)
_SPLITMIX_2 = _as_signed(0x94D049BB133111EB, 64)
_LOWBIAS_1 = _as_signed(0x7FEB352D, 32)
_LOWBIAS_2 = _as_signed(0x846CA68B, 32)
_TOKEN_STEP = _as_signed(0x9E3779B9, 32)


def _shift_right(x: Tensor, count: int, bits: int) -> Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (x >> count).bitwise_and_((1 << (bits - count)) - 1)


def _mix64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30, 64)) * _SPLITMIX_1
    x = (x ^ _shift_right(x, 27, 64)) * _SPLITMIX_2
    return x ^ _shift_right(x, 31, 64)


def _mix32_(x: Tensor) -> Tensor:
    x.bitwise_xor_(_shift_right(x, 16, 32)).mul_(_LOWBIAS_1)
    x.bitwise_xor_(_shift_right(x, 15, 32)).mul_(_LOWBIAS_2)
    return x.bitwise_xor_(_shift_right(x, 16, 32))


def random_bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for each (row, token). seeds, positions: [R] int64; tokens: [V] int32. Returns [R, V] int32."""
    key = _mix64(_mix64(seeds + _GOLDEN) ^ (positions + 1) * _GOLDEN)
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)  # conversion keeps the low 32 bits
    x = (tokens * _TOKEN_STEP)[None, :] ^ low[:, None]
    return _mix32_(_mix32_(x).bitwise_xor_(high[:, None]))


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, [R, V] float32: the argmax of ``logits + noise`` is a sample of their softmax.

    ``-log(-log1p(-u))`` rather than ``-log(-log u)``: float32 is fine near u = 0, which is where the winners are,
    and coarse near 1. u has 31 bits, so a token of probability 1e-9 can still win.
    """
    u = _shift_right(random_bits(seeds, positions, tokens), 1, 32).to(torch.float32)
    u.mul_(2.0**-31).add_(2.0**-32)
    return u.neg_().log1p_().neg_().log_().neg_()
