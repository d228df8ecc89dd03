"""RMSNorm and LayerNorm, alone or after the residual add.

The residual stream is float32 whatever the dtype of the model: a sum over 2 x layers terms that bfloat16 would round at
each of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import DTYPES, Pool, emit, empty, rows_of


def rms_norm(pool: Pool, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """x: [T, D] or [T, H, D], adjacent in D; weight: [D], x's dtype or float32; out: like x, may be x itself."""
    return _norm(pool, x, weight, None, eps, out)


def layer_norm(pool: Pool, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x: [T, D] or [T, H, D], adjacent in D; weight, bias: [D], x's dtype or float32."""
    return _norm(pool, x, weight, bias, eps, None)


def add_rms_norm(pool: Pool, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) for x [T, D] and a residual of x's dtype or float32.

    The norm has x's dtype. The sum is float32: the residual itself, overwritten, if that is float32, else a new tensor.
    """
    return _add_norm(pool, x, residual, weight, None, eps)


def add_layer_norm(
    pool: Pool, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As :func:`add_rms_norm`, with LayerNorm."""
    return _add_norm(pool, x, residual, weight, bias, eps)


def _norm(pool: Pool, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, out: Tensor | None) -> Tensor:
    _check(x, weight, bias)
    if x.dim() not in (2, 3):
        raise ValueError(f"x must be [T, D] or [T, H, D], not {tuple(x.shape)}")
    rows = rows_of(x)
    if out is None:
        out = empty(rows, tuple(x.shape[1:]), x.dtype)
    elif out.shape != x.shape or out.dtype != x.dtype or out.stride(-1) != 1:
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} {out.stride()}, x {x.dtype} {tuple(x.shape)}")
    heads, x_head, out_head = (1, 0, 0) if x.dim() == 2 else (x.shape[1], x.stride(1), out.stride(1))
    emit(pool, program.NORM, x.dtype, rows, (x, weight, bias, out),
         (x.shape[-1], heads, x.stride(0), x_head, out.stride(0), out_head, 0, 0, 0, DTYPES[weight.dtype]),
         (eps,))  # fmt: skip
    return out


def _add_norm(
    pool: Pool, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    _check(x, weight, bias)
    if x.dim() != 2 or residual.shape != x.shape or residual.stride(1) != 1:
        raise ValueError(f"x and residual must both be [T, D], not {tuple(x.shape)} and {tuple(residual.shape)}")
    if residual.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"residual must be float32 or {x.dtype}, not {residual.dtype}")
    rows, columns = rows_of(x), x.shape[1]
    out = empty(rows, (columns,), x.dtype)
    total = residual if residual.dtype == torch.float32 else empty(rows, (columns,), torch.float32)
    emit(pool, program.NORM, x.dtype, rows, (x, weight, bias, out, residual, total),
         (columns, 1, x.stride(0), 0, out.stride(0), 0, residual.stride(0), total.stride(0),
          DTYPES[residual.dtype], DTYPES[weight.dtype]),
         (eps,))  # fmt: skip
    return out, total


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.stride(-1) != 1:
        raise ValueError(f"x's last dimension must be adjacent, not {x.stride()}")
    for parameter in (weight, weight if bias is None else bias):
        if parameter.shape != x.shape[-1:] or not parameter.is_contiguous() or parameter.dtype != weight.dtype:
            raise ValueError(f"weight and bias must be [{x.shape[-1]}], not {parameter.dtype} {tuple(parameter.shape)}")
    if weight.dtype not in (torch.float32, x.dtype):
        raise ValueError(f"weight must be float32 or {x.dtype}, not {weight.dtype}")
