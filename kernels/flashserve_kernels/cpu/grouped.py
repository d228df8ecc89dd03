"""Weights in groups, packed into panels of 32 columns; activations are quantised per row and group at run time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.elementwise import ACTIVATIONS
from flashserve_kernels.cpu.program import DTYPES, Pool, Rows, emit, empty, rows_of
from flashserve_kernels.grouped import (
    SCALES,
    Grouped,
    GroupedFormat,
    GroupedRows,
    JoinedRows,
    concatenate,
    is_exact,
    split_unlike,
)

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


@dataclass(frozen=True)
class PackedParts:
    """Weights of equal inputs and unlike formats, one after the other; none is gated."""

    parts: tuple[PackedGrouped, ...]

    @property
    def n(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def k(self) -> int:
        return self.parts[0].k

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)


def pack(pool: Pool, weight: GroupedRows, gated: bool = False) -> PackedGrouped | PackedParts:
    """``pack_grouped``, but parts of unlike formats each in its own, where together they would be much wider."""
    if gated or not isinstance(weight, JoinedRows):
        return pack_grouped(pool, weight, gated)
    parts = tuple(pack_grouped(pool, part) for part in split_unlike(weight))
    return parts[0] if len(parts) == 1 else PackedParts(parts)


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
    pool: Pool,
    x: Tensor,
    packed: PackedGrouped | PackedParts,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``x @ weight.T + bias``. x: [T, k], rows may be strided; bias: [n]. Returns [T, n] of x's dtype, or float32."""
    parts = packed.parts if isinstance(packed, PackedParts) else (packed,)
    if any(part.gated for part in parts):
        raise ValueError("a gated weight is for linear_gated")
    return _linear(pool, x, parts, bias, out_dtype or x.dtype, packed.n)


def linear_gated(
    pool: Pool, x: Tensor, packed: PackedGrouped | PackedParts, activation: Activation, bias: Tensor | None = None
) -> Tensor:
    """``activation(gate) * up`` of ``gate | up = x @ weight.T + bias``. x: [T, k]; bias: [n]. Returns [T, n / 2]."""
    if isinstance(packed, PackedParts) or not packed.gated:
        raise ValueError("linear_gated needs a weight that was packed as gated")
    return _linear(pool, x, (packed,), bias, x.dtype, packed.n // 2, ACTIVATIONS[activation])


def _linear(
    pool: Pool,
    x: Tensor,
    parts: tuple[PackedGrouped, ...],
    bias: Tensor | None,
    out_dtype: torch.dtype,
    columns: int,
    activation: int = 0,
) -> Tensor:
    k, n = parts[0].k, sum(part.n for part in parts)
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != k or (k > 1 and x.stride(1) != 1):
        raise ValueError(f"x must be [T, {k}] with contiguous rows, not {x.dtype} {tuple(x.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (n,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be {x.dtype} [{n}], not {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in (x.dtype, torch.float32):
        raise ValueError(f"the result can be {x.dtype} or float32, not {out_dtype}")
    rows = rows_of(x)
    by_group = {group: _quantize(pool, x, rows, group) for group in sorted({part.format.group for part in parts})}
    out = empty(rows, (columns,), out_dtype)
    first = 0
    for part in parts:
        quantized = by_group[part.format.group]
        part_bias = None if bias is None else bias[first : first + part.n]
        emit(
            pool, program.LINEAR_GROUPED, x.dtype, rows, (quantized, part.memory, part_bias, out[:, first:]),
            (
                k, part.n, quantized.stride(0), out.stride(0), part.gated, DTYPES[out_dtype], 0, activation,
                *_numbers(part.format),
            ),
        )  # fmt: skip
        first += part.n
    return out


def _quantize(pool: Pool, x: Tensor, rows: Rows, group: int) -> Tensor:
    k = x.shape[1]
    quantized = empty(rows, (-(-k // group) * (group + 8),), torch.uint8)
    emit(pool, program.QUANTIZE_GROUPS, x.dtype, rows, (x, quantized), (k, x.stride(0), quantized.stride(0), group))
    return quantized


def _numbers(format: GroupedFormat) -> tuple[int, int, int, int]:
    """grouped.h's GroupedFormat."""
    return format.bits, format.group, SCALES.index(format.scales), -1 if format.zero is None else format.zero
