"""Embedding rows and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import Pool, emit, empty, rows_of

_SILU_AND_MUL, _GELU_TANH = range(2)
"""elementwise.cpp's Activation."""


def embedding(pool: Pool, table: Tensor, ids: Tensor) -> Tensor:
    """table: [V, D], any dtype; ids: [T] int64, each in [0, V). Returns [T, D]."""
    _check_rows("table", table)
    _check_ids(ids)
    rows, item = rows_of(ids), table.dtype.itemsize
    out = empty(rows, (table.shape[1],), table.dtype)
    num_bytes = table.shape[1] * item
    # Bytes are copied, so the dtype does not matter.
    emit(pool, program.EMBEDDING, torch.float32, rows, (table, ids, out),
         (num_bytes, table.stride(0) * item, out.stride(0) * item))  # fmt: skip
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


def silu_and_mul(pool: Pool, gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``. gate_up: [T, 2 I], gate first. Returns [T, I]."""
    return _activate(pool, _SILU_AND_MUL, gate_up, gate_up.shape[1] // 2)


def gelu_tanh(pool: Pool, x: Tensor) -> Tensor:
    """GELU in its tanh form. x: [T, I]. Returns [T, I]."""
    return _activate(pool, _GELU_TANH, x, x.shape[1])


def _activate(pool: Pool, which: int, x: Tensor, columns: int) -> Tensor:
    _check_rows("x", x)
    rows = rows_of(x)
    out = empty(rows, (columns,), x.dtype)
    emit(pool, program.ACTIVATION, x.dtype, rows, (x, out), (which, columns, x.stride(0), out.stride(0)))
    return out


def _check_rows(name: str, x: Tensor) -> None:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"{name} must be [rows, columns] with adjacent columns, not {tuple(x.shape)} {x.stride()}")


def _check_ids(ids: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(f"ids must be contiguous int64 [T], not {ids.dtype} {tuple(ids.shape)}")
