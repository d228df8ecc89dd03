"""Activations of the feed-forward layers: see :mod:`flashserve_kernels.activation`.

Bound by memory. Per output element of a 16-bit dtype: SwiGLU moves 6 bytes (two reads, one write), GELU 4. Expected:
85% or more of the copy bandwidth from a few megabytes on. Intermediates stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

# 128 threads with 8 elements each: 16-byte loads of a 16-bit dtype, and enough programs for one token's row.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def silu_and_mul_kernel(x_ptr, out_ptr, x_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x_ptr + row * x_stride + column, mask).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + WIDTH + column, mask).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + column, result.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["size"])
def gelu_tanh_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask).to(tl.float32)
    # x (1 + tanh z) / 2 = x sigmoid(2 z), with 2 sqrt(2 / pi) = 1.5957691
    result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [T, 2 I], gate first, rows contiguous. Returns [T, I]."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_tokens, width))
    if out.numel():
        grid = num_tokens, triton.cdiv(width, _BLOCK)
        launch(silu_and_mul_kernel, grid, gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def gelu_tanh(x: Tensor) -> Tensor:
    """Any shape."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        launch(gelu_tanh_kernel, grid, x, out, x.numel(), BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model."""
    gate_up = torch.empty((2, 2 * shape.intermediate_size), dtype=shape.dtype, device="meta")
    yield from record(properties, lambda: (silu_and_mul(gate_up), gelu_tanh(gate_up)))
