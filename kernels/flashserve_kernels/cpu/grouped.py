"""Weights in groups, packed into panels of 32 columns; activations are quantised per row and group at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.elementwise import ACTIVATIONS
from flashserve_kernels.cpu.program import DTYPES, Pool, Rows, emit, empty, rows_of
from flashserve_kernels.grouped import SCALES, Grouped, GroupedFormat, GroupedRows, concatenate, is_exact

_PANEL = 32  # gemm.h
_PIECE_CODES = 4 << 20  # unpacked at a time while loading


@dataclass(frozen=True)
class PackedGrouped:
    """A weight [n, k] in the layout of cpu/src/grouped.h."""

    memory: Tensor
    n: int
    k: int
    format: GroupedFormat
    gated: bool
    """Rows were gate, then up; panels hold 16 of each, for a gated product."""

    @property
    def num_bytes(self) -> int:
        return self.memory.numel()


def pack_grouped(pool: Pool, weight: GroupedRows, gated: bool = False) -> PackedGrouped:
    """Pack a weight, some of its rows at a time. gated: gate rows, then as many up rows.

    Raises ValueError for a shape or format that the kernels do not take, and where scales are not exact in theirs.
    """
    (n, k), format = weight.shape, weight.format
    if n < 1 or k < 1 or (gated and n % 2):
        raise ValueError(f"a weight of {n} rows and {k} columns cannot be packed{' as gated' if gated else ''}")
    if format.bits not in (4, 8) or format.group not in (16, 32):
        raise ValueError(f"groups of {format.group} codes of {format.bits} bits cannot be packed")
    width, outputs = (_PANEL // 2, n // 2) if gated else (_PANEL, n)
    panels = -(-outputs // width)
    panel_bytes = round(-(-k // format.group) * format.group * _PANEL * format.bits_per_weight / 8)
    memory = pool.arena.allocate(panels * panel_bytes)
    piece = max(1, _PIECE_CODES // (_PANEL * k))
    for first in range(0, panels, piece):
        begin, end = first * width, min((first + piece) * width, outputs)
        rows = [weight.rows(begin, end)] + ([weight.rows(outputs + begin, outputs + end)] if gated else [])
        _pack_panels(pool, concatenate(rows), gated, memory[first * panel_bytes :])
    return PackedGrouped(memory, n, k, format, gated)


def _pack_panels(pool: Pool, rows: Grouped, gated: bool, memory: Tensor) -> None:
    _check_exact(rows)
    n, k = rows.shape
    panels = -(-n // _PANEL)
    tensors = (rows.codes.contiguous(), rows.scales.contiguous(), rows.minimums.contiguous(), memory)
    emit(pool, program.PACK_GROUPED, torch.float32, Rows(program.TOKENS, panels), tensors,
         (k, n, gated, 0, 0, 0, 0, 0, *_numbers(rows.format)))  # fmt: skip


def _check_exact(rows: Grouped) -> None:
    """Raise ValueError where packing would change a value."""
    format = rows.format
    if int(rows.codes.max()) >= 2**format.bits:
        raise ValueError(f"codes of {format.bits} bits must be below {2**format.bits}, not {int(rows.codes.max())}")
    kept = [rows.scales]
    if format.zero is None:
        kept.append(rows.minimums)
    elif not torch.equal(rows.minimums, rows.scales * -format.zero):
        raise ValueError(f"minimums are not those of a zero of {format.zero}")
    for numbers in kept:
        if not is_exact(numbers, format.scales):
            raise ValueError(f"scales are not exact in {format.scales}")


def embedding(pool: Pool, table: PackedGrouped, ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows of a packed weight that is not gated. ids: [T] int64, each in [0, n). Returns [T, k]."""
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous():
        raise ValueError(f"ids must be int64 [T], not {ids.dtype} {tuple(ids.shape)}")
    if table.gated:
        raise ValueError("rows of a gated weight cannot be looked up")
    rows = rows_of(ids)
    out = empty(rows, (table.k,), dtype)
    emit(pool, program.EMBEDDING_GROUPED, dtype, rows, (table.memory, ids, out),
         (table.k, out.stride(0), 0, 0, 0, 0, 0, 0, *_numbers(table.format)), (scale,))  # fmt: skip
    return out


def linear(
    pool: Pool, x: Tensor, packed: PackedGrouped, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ weight.T + bias``. x: [T, k], rows may be strided; bias: [n]. Returns [T, n] of x's dtype, or float32."""
    if packed.gated:
        raise ValueError("a gated weight is for linear_gated")
    return _linear(pool, x, packed, bias, out_dtype or x.dtype, packed.n)


def linear_gated(
    pool: Pool, x: Tensor, packed: PackedGrouped, activation: Activation, bias: Tensor | None = None
) -> Tensor:
    """``activation(gate) * up`` of ``gate | up = x @ weight.T + bias``. x: [T, k]; bias: [n]. Returns [T, n / 2]."""
    if not packed.gated:
        raise ValueError("linear_gated needs a weight that was packed as gated")
    return _linear(pool, x, packed, bias, x.dtype, packed.n // 2, ACTIVATIONS[activation])


def _linear(
    pool: Pool,
    x: Tensor,
    packed: PackedGrouped,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    columns: int,
    activation: int = 0,
) -> Tensor:
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != packed.k or (packed.k > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [T, {packed.k}] with contiguous rows, not {x.dtype} {tuple(x.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (packed.n,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be {x.dtype} [{packed.n}], not {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"the result can be {x.dtype} or float32, not {out_dtype}")
    rows, format = rows_of(x), packed.format
    groups = -(-packed.k // format.group)
    quantized = empty(rows, (groups * (format.group + 8),), torch.uint8)
    emit(pool, program.QUANTIZE_GROUPS, x.dtype, rows, (x, quantized),
         (packed.k, x.stride(0), quantized.stride(0), format.group))  # fmt: skip
    out = empty(rows, (columns,), out_dtype)
    emit(
        pool, program.LINEAR_GROUPED, x.dtype, rows, (quantized, packed.memory, bias, out),
        (
            packed.k, packed.n, quantized.stride(0), out.stride(0), packed.gated, DTYPES[out_dtype], 0, activation,
            *_numbers(format),
        ),
    )  # fmt: skip
    return out


def _numbers(format: GroupedFormat) -> tuple[int, int, int, int]:
    """grouped.h's GroupedFormat."""
    return format.bits, format.group, SCALES.index(format.scales), -1 if format.zero is None else format.zero
