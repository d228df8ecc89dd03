"""Embedding rows and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import Pool, emit, empty, rows_of

_SOFT_CAP = 3
ACTIVATIONS: dict[Activation, int] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
"""activation.h's Activation."""


def embedding(pool: Pool, table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
    """``table[ids] * scale``. table: [V, D], of any dtype if scale is 1; ids: [T] int64, each in [0, V).
    Returns [T, D]."""
    _check_rows("table", table)
    _check_ids(ids)
    if scale != 1.0 and not table.dtype.is_floating_point:
        raise ValueError(f"rows of {table.dtype} cannot be scaled")
    rows, item = rows_of(ids), table.dtype.itemsize
    out = empty(rows, (table.shape[1],), table.dtype)
    # Bytes are copied where nothing is scaled, so the dtype does not matter then.
    dtype = torch.float32 if scale == 1.0 else table.dtype
    emit(pool, program.EMBEDDING, dtype, rows, (table, ids, out),
         (table.shape[1] * item, table.stride(0) * item, out.stride(0) * item), (scale,))  # fmt: skip
    return out


def add_embedding_(pool: Pool, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``x += table[ids]``. x: [T, D]; table: [V, D] of x's dtype; ids: [T] int64. Returns x."""
    _check_rows("x", x)
    _check_rows("table", table)
    _check_ids(ids)
    if table.dtype != x.dtype or table.shape[1] != x.shape[1]:
        raise ValueError(f"table is {table.dtype} {tuple(table.shape)}, x {x.dtype} {tuple(x.shape)}")
    emit(pool, program.ADD_EMBEDDING, x.dtype, rows_of(x), (x, table, ids), (x.shape[1], x.stride(0), table.stride(0)))
    return x


def activate(pool: Pool, x: Tensor, activation: Activation) -> Tensor:
    """x: [T, I]. Returns [T, I]."""
    _check_rows("x", x)
    rows = rows_of(x)
    out = empty(rows, (x.shape[1],), x.dtype)
    emit(pool, program.ACTIVATION, x.dtype, rows, (x, out),
         (ACTIVATIONS[activation], x.shape[1], x.stride(0), out.stride(0)))  # fmt: skip
    return out


def soft_cap_(pool: Pool, x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)`` in place. x: [N, V]. Returns x."""
    _check_rows("x", x)
    emit(
        pool, program.ACTIVATION, x.dtype, rows_of(x), (x, x), (_SOFT_CAP, x.shape[1], x.stride(0), x.stride(0)), (cap,)
    )
    return x


def _check_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{name} must be [rows, columns] with adjacent columns, not {tuple(x.shape)} {x.stride()}")


def _check_ids(ids: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous int64 [T], not {ids.dtype} {tuple(ids.shape)}")
