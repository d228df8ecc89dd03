"""RMSNorm and LayerNorm, alone or after the residual add: see :mod:`flashserve_kernels.norm`.

Bound by memory. Per element of a 16-bit dtype: 4 bytes alone (read, write), 8 with the add (two reads, two writes);
the row stays in registers between its statistics and its scaling. Expected: 85% or more of the copy bandwidth from
about a thousand rows on; a decode step's few rows are bound by the launch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record


@triton.jit(do_not_specialize=["num_rows"])
def norm_kernel(
    x_ptr,
    residual_ptr,  # None: no add before the norm
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    x_token_stride,
    x_head_stride,
    residual_stride,
    out_token_stride,
    out_head_stride,
    eps,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    CENTER: tl.constexpr,  # LayerNorm: subtract the mean, add the bias
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    in_column = column < D
    mask = (row < num_rows)[:, None] & in_column
    token = (row // HEADS).to(tl.int64)[:, None]
    head = (row % HEADS)[:, None]
    x_at = x_ptr + token * x_token_stride + head * x_head_stride + column
    x = tl.load(x_at, mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + token * residual_stride + column, mask, other=0.0).to(tl.float32)
        total = x.to(x_ptr.dtype.element_ty)
        tl.store(x_at, total, mask)
        x = total.to(tl.float32)  # the norm sees the sum as it is stored
    weight = tl.load(weight_ptr + column, in_column, other=0.0).to(tl.float32)
    if CENTER:
        x = tl.where(in_column, x - (tl.sum(x, 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1) / D + eps)
    normed = x * scale[:, None] * weight
    if CENTER:
        normed += tl.load(bias_ptr + column, in_column, other=0.0).to(tl.float32)
    out_at = out_ptr + token * out_token_stride + head * out_head_stride + column
    tl.store(out_at, normed.to(out_ptr.dtype.element_ty), mask)


def _tile(hidden: int) -> tuple[int, int, int]:
    """Rows per program, columns of its tile, and warps: 8 to 16 elements per thread, at least 1024 per program."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, 1024 // block)
    return rows, block, min(16, max(4, block // 512))


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Heads, and the strides of a token and of a head: [T, D] is [T, 1, D]."""
    if x.stride(-1) != 1 or x.dim() > 3:
        raise ValueError(f"norms take [T, D] or [T, H, D] with contiguous rows, not {tuple(x.shape)} {x.stride()}")
    if x.dim() == 3:
        return x.shape[1], x.stride(0), x.stride(1)
    return 1, x.stride(0) if x.dim() == 2 else 0, 0


def _norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None
) -> Tensor:
    out = x.new_empty(x.shape) if out is None else out
    hidden = x.shape[-1]
    heads, token_stride, head_stride = _strides(x)
    _, out_token_stride, out_head_stride = _strides(out)
    num_rows = x.numel() // hidden
    if num_rows == 0:
        return out
    rows, block, num_warps = _tile(hidden)
    launch(
        norm_kernel,
        (triton.cdiv(num_rows, rows),),
        x,
        residual,
        weight,
        bias,
        out,
        num_rows,
        token_stride,
        head_stride,
        0 if residual is None else _strides(residual)[1],
        out_token_stride,
        out_head_stride,
        eps,
        HEADS=heads,
        D=hidden,
        ROWS=rows,
        BLOCK=block,
        ADD=residual is not None,
        CENTER=bias is not None,
        num_warps=num_warps,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x: [T, D] or [T, H, D], rows contiguous; weight: [D]; out: like x, may be x itself."""
    return _norm(x, None, weight, None, eps, out)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual: [T, D]. Returns (rms_norm(x + residual), x), x overwritten with the sum."""
    return _norm(x, residual, weight, None, eps, None), x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [T, D] or [T, H, D], rows contiguous; weight, bias: [D]."""
    return _norm(x, None, weight, bias, eps, None)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As :func:`add_rms_norm`, with LayerNorm."""
    return _norm(x, residual, weight, bias, eps, None), x


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model: norms of the hidden state."""

    def empty(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    x, residual = empty(2, shape.hidden_size), empty(2, shape.hidden_size)
    vector = empty(shape.hidden_size, dtype=shape.norm_dtype or shape.dtype)

    def calls() -> None:
        rms_norm(x, vector, 1e-6)
        add_rms_norm(x, residual, vector, 1e-6)
        layer_norm(x, vector, vector, 1e-5)
        add_layer_norm(x, residual, vector, vector, 1e-5)

    yield from record(properties, calls)
