"""Activations of the feed-forward layers, and the soft cap: see :mod:`flashserve_kernels.activation`.

Bound by memory. Per output element of a 16-bit dtype: a gated unit moves 6 bytes (two reads, one write), the others 4.
Expected: 85% or more of the copy bandwidth from a few megabytes on. Intermediates stay float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

# 128 threads with 8 elements each: 16-byte loads of a 16-bit dtype, and enough programs for one token's row.
_BLOCK = 1024
_WARPS = 4


@triton.jit
def apply_activation(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        result = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu_tanh":
        # x (1 + tanh z) / 2 = x sigmoid(2 z), with 2 sqrt(2 / pi) = 1.5957691
        result = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return result


@triton.jit
def activate_and_mul_kernel(
    x_ptr,
    out_ptr,
    x_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    gate = tl.load(x_ptr + row * x_stride + column, mask).to(tl.float32)
    up = tl.load(x_ptr + row * x_stride + WIDTH + column, mask).to(tl.float32)
    result = apply_activation(gate, ACTIVATION) * up
    tl.store(out_ptr + row * WIDTH + column, result.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["size"])
def activate_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    result = apply_activation(tl.load(x_ptr + at, mask).to(tl.float32), ACTIVATION)
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["size"])
def soft_cap_kernel(x_ptr, size, cap, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    x = tl.load(x_ptr + at, mask).to(tl.float32)
    e = tl.exp(-2.0 * tl.div_rn(tl.abs(x), cap))  # tanh |z| = (1 - e) / (1 + e), e = exp(-2 |z|)
    result = tl.where(x < 0, -cap, cap) * tl.div_rn(1.0 - e, 1.0 + e)
    tl.store(x_ptr + at, result.to(x_ptr.dtype.element_ty), mask)


def activate_and_mul(gate_up: Tensor, activation: Activation) -> Tensor:
    """gate_up: [T, 2 I], gate first, rows contiguous. Returns [T, I]."""
    num_tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty((num_tokens, width))
    if out.numel():
        grid = num_tokens, triton.cdiv(width, _BLOCK)
        launch(
            activate_and_mul_kernel,
            grid,
            gate_up,
            out,
            gate_up.stride(0),
            WIDTH=width,
            BLOCK=_BLOCK,
            ACTIVATION=activation,
            num_warps=_WARPS,
        )
    return out


def activate(x: Tensor, activation: Activation) -> Tensor:
    """Any shape."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        launch(activate_kernel, grid, x, out, x.numel(), BLOCK=_BLOCK, ACTIVATION=activation, num_warps=_WARPS)
    return out


def soft_cap_(x: Tensor, cap: float) -> Tensor:
    """x: contiguous, of any shape, overwritten. Returns x."""
    if not x.is_contiguous():
        raise ValueError(f"a soft cap works in place on contiguous numbers, not on {tuple(x.shape)} {x.stride()}")
    if x.numel():
        grid = (triton.cdiv(x.numel(), _BLOCK),)
        launch(soft_cap_kernel, grid, x, x.numel(), float(cap), BLOCK=_BLOCK, num_warps=_WARPS)
    return x


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model."""
    width = 2 * shape.intermediate_size if shape.gated else shape.intermediate_size
    inner = torch.empty((2, width), dtype=shape.dtype, device="meta")
    logits = torch.empty((2, shape.vocab_size), dtype=shape.dtype, device="meta")

    def calls() -> None:
        (activate_and_mul if shape.gated else activate)(inner, shape.activation)
        if shape.caps_logits:
            soft_cap_(logits, 1.0)

    yield from record(properties, calls)
