"""The noise of :mod:`flashserve_kernels.noise` inside kernels: the same bits on every device.

Unsigned arithmetic wraps and shifts without the sign, so the functions are the reference's formulas as written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

_BLOCK = 1024


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_key(seed, position):
    """The 64-bit key of a row, from its int64 seed and position."""
    golden = 0x9E3779B97F4A7C15
    return _mix64(_mix64(seed.to(tl.uint64) + golden) ^ ((position.to(tl.uint64) + 1) * golden))


@triton.jit
def noise_bits(key, token):
    """32 random bits for each token of a row. Returns uint32."""
    x = (token.to(tl.uint32) * 0x9E3779B9) ^ key.to(tl.uint32)
    return _mix32(_mix32(x) ^ (key >> 32).to(tl.uint32))


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise, float32, from random bits."""
    u = (bits >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10  # 2^-31, 2^-32
    # -log(1 - u): where the winners are, near 0, by its series (relative error u^4 / 5 < 2^-26), since 1 - u has
    # lost their digits there.
    near_zero = u * (1.0 + u * (0.5 + u * (0.3333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, near_zero, -tl.log(1.0 - u)))


@triton.jit(do_not_specialize=["num_tokens"])
def noise_kernel(seeds_ptr, positions_ptr, tokens_ptr, out_ptr, num_tokens, BLOCK: tl.constexpr, GUMBEL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_tokens
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    bits = noise_bits(key, tl.load(tokens_ptr + column, mask, other=0))
    out_at = out_ptr + row * num_tokens + column
    if GUMBEL:
        tl.store(out_at, gumbel(bits), mask)
    else:
        tl.store(out_at, bits.to(tl.int32, bitcast=True), mask)


def random_bits(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """seeds, positions: [R] int64; tokens: [V] int32. Returns [R, V] int32, the reference's bits."""
    return _noise(seeds, positions, tokens, torch.int32)


def gumbel_noise(seeds: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """As :func:`random_bits`; returns [R, V] float32, the reference's up to the device's logarithm."""
    return _noise(seeds, positions, tokens, torch.float32)


def _noise(seeds: Tensor, positions: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty((seeds.shape[0], tokens.shape[0]), dtype=dtype, device=seeds.device)
    if out.numel():
        grid = seeds.shape[0], triton.cdiv(tokens.shape[0], _BLOCK)
        is_float = dtype == torch.float32
        launch(noise_kernel, grid, seeds, positions, tokens, out, tokens.shape[0], BLOCK=_BLOCK, GUMBEL=is_float)
    return out


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start."""
    rows = torch.empty(2, dtype=torch.int64, device="meta")
    tokens = torch.empty(8, dtype=torch.int32, device="meta")
    yield from record(properties, lambda: (random_bits(rows, rows, tokens), gumbel_noise(rows, rows, tokens)))
