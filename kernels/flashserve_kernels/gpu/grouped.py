"""Products with weights in groups that stay as they are: see :mod:`flashserve_kernels.grouped`.

A group's codes become numbers of the activations' dtype inside the kernel, ``scale * code + minimum`` rounded once, and
go into a matrix product of 16 bits: the products of the weight dequantised, without its bytes. A weight of Q4_K takes
5.5 bits where bfloat16 takes 16, so a step of few rows, which is bound by memory, may take a third of the time; no GPU
has measured it yet. Activations are not quantised, unlike on a CPU: tensor cores would gain nothing at few rows.

In memory a weight is panels of 32 outputs, each its groups one after the other: [panels, steps, 32, group] bytes of
codes, a step being one group, or two whose codes of 4 bits share bytes, the first in the lower half; and [panels,
groups, 32] scales. So a tile of codes is one run of memory, and all of a step's outputs have their scales side by side.

Few rows have fewer tiles than a GPU has multiprocessors: the inputs are split among programs then, whose float32 sums a
second kernel adds up, always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties, gpu_properties
from flashserve_kernels.gpu.dot import dot
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.grouped import Grouped, GroupedFormat, GroupedRows, JoinedRows, split_unlike

_PANEL = 32
_PIECE_CODES = 16 << 20  # unpacked at a time while loading
_BLOCK = 256  # inputs of a row that a program looks up
_SUMS = 1024
_PROGRAMS_PER_SM = 8  # of two warps: four loads of 1 KiB each in flight cover 500 ns of 4 TB/s on 132 multiprocessors
_FEWEST_STEPS = 8  # of a split
_F24_UNIT = 2.0**-100


@dataclass(frozen=True)
class Panels:
    """A weight [n, k] on the device."""

    codes: Tensor
    """[panels, steps, 32, group] uint8."""
    scales: Tensor
    """[1 or 2, panels, groups, 32]: scales, then minimums unless the format has a zero. float16 or float32; of a
    float24 the upper 16 bits, as int16."""
    lower: Tensor | None
    """The lower 8 bits of float24s, uint8."""
    n: int
    k: int
    format: GroupedFormat

    @property
    def num_bytes(self) -> int:
        kept = (self.codes, self.scales) if self.lower is None else (self.codes, self.scales, self.lower)
        return sum(tensor.nbytes for tensor in kept)


@dataclass(frozen=True)
class _ProductTile:
    block_m: int
    block_n: int
    warps: int
    stages: int


_FEW, _SOME, _MANY = _ProductTile(16, _PANEL, 2, 4), _ProductTile(64, 64, 4, 3), _ProductTile(128, 64, 8, 3)
_FULL = _ProductTile(32, 32, 4, 3)
"""For more than a few rows of float32, whose products have no tensor cores: larger tiles spilled."""


# --- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_scales(scales_ptr, lower_ptr, at, mask):
    """Numbers of a scale's type as float32."""
    if lower_ptr is None:
        value = tl.load(scales_ptr + at, mask, other=0).to(tl.float32)
    else:
        upper = tl.load(scales_ptr + at, mask, other=0).to(tl.int32)
        lower = tl.load(lower_ptr + at, mask, other=0).to(tl.int32)
        # A sign, 6 bits of exponent and 17 of fraction: a float32 times 2^-100 without what is 0 in it.
        bits = (((upper << 16) | (lower << 8)) >> 2) & -0x60000001
        value = bits.to(tl.float32, bitcast=True) * 1.2676506002282294e30
    return value


@triton.jit
def _scale_and_minimum(scales_ptr, lower_ptr, at, mask, minimums_at, ZERO: tl.constexpr):
    scale = _load_scales(scales_ptr, lower_ptr, at, mask)
    if ZERO is None:  # noqa: SIM108 (the compiler would look at both sides)
        minimum = _load_scales(scales_ptr, lower_ptr, at + minimums_at, mask)
    else:
        minimum = scale * -ZERO
    return scale, minimum


@triton.jit
def _add_group(
    acc, codes, x_rows, row_mask, scales_ptr, lower_ptr, scales_at, columns, minimums_at, group, num_inputs,
    GROUP: tl.constexpr, PANEL: tl.constexpr, ZERO: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] plus the products of one group; codes: [GROUP, BLOCK_N]."""
    k = group * GROUP + tl.arange(0, GROUP)
    x = tl.load(x_rows[:, None] + k[None, :], row_mask[:, None] & (k < num_inputs)[None, :], other=0.0)
    scale, minimum = _scale_and_minimum(
        scales_ptr, lower_ptr, scales_at + group * PANEL, columns, minimums_at, ZERO
    )  # fmt: skip
    weight = codes.to(tl.float32) * scale[None, :] + minimum[None, :]
    return dot(x, weight.to(x.dtype), acc)


@triton.jit(do_not_specialize=["num_rows", "num_outputs", "num_steps", "steps_per_split", "split_stride"])
def grouped_linear_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    lower_ptr,  # None: scales are no float24s
    bias_ptr,  # None: no bias, or the sums of a split
    out_ptr,
    num_rows,
    num_inputs,
    num_outputs,
    num_steps,
    steps_per_split,
    minimums_at,
    x_stride,
    out_stride,
    split_stride,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,  # None: minimums are kept
    PANEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    GROUPS: tl.constexpr = 8 // BITS  # of a step
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    rows, columns = row < num_rows, column < num_outputs
    panel, lane = (column // PANEL).to(tl.int64), column % PANEL
    inner = tl.arange(0, GROUP)
    x_rows = x_ptr + row.to(tl.int64) * x_stride
    codes_at = codes_ptr + (panel * num_steps * (PANEL * GROUP) + lane * GROUP)[None, :] + inner[:, None]
    scales_at = panel * num_steps * (GROUPS * PANEL) + lane
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first = split * steps_per_split
    for step in range(first, tl.minimum(first + steps_per_split, num_steps)):
        codes = tl.load(codes_at + step * (PANEL * GROUP), columns[None, :], other=0)
        for part in tl.static_range(GROUPS):
            own = (codes >> (part * BITS)) & (2**BITS - 1)
            acc = _add_group(
                acc, own, x_rows, rows, scales_ptr, lower_ptr, scales_at, columns, minimums_at, step * GROUPS + part,
                num_inputs, GROUP, PANEL, ZERO,
            )  # fmt: skip
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, columns, other=0.0).to(tl.float32)[None, :]
    out_at = out_ptr + split.to(tl.int64) * split_stride + row.to(tl.int64)[:, None] * out_stride + column[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), rows[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["num_outputs", "num_splits", "split_stride"])
def add_splits_kernel(
    sums_ptr, bias_ptr, out_ptr, num_outputs, num_splits, split_stride, row_stride, out_stride, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < num_outputs
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(num_splits):
        total += tl.load(sums_ptr + split * split_stride + row * row_stride + column, mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + column, mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + column, total.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_steps"])
def grouped_embedding_kernel(
    ids_ptr,
    codes_ptr,
    scales_ptr,
    lower_ptr,
    out_ptr,
    num_inputs,
    num_steps,
    minimums_at,
    times,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    ZERO: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = 8 // BITS
    token = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = k < num_inputs
    row = tl.load(ids_ptr + token).to(tl.int64)
    panel, lane, group = row // PANEL, row % PANEL, k // GROUP
    step = panel * num_steps + group // GROUPS
    codes = tl.load(codes_ptr + (step * PANEL + lane) * GROUP + k % GROUP, mask, other=0)
    codes = (codes >> ((group % GROUPS) * BITS).to(tl.uint8)) & (2**BITS - 1)
    at = (panel * num_steps * GROUPS + group) * PANEL + lane
    scale, minimum = _scale_and_minimum(scales_ptr, lower_ptr, at, mask, minimums_at, ZERO)
    value = (codes.to(tl.float32) * scale + minimum) * times
    tl.store(out_ptr + token * num_inputs + k, value.to(out_ptr.dtype.element_ty), mask)


# --- packing -------------------------------------------------------------------------------------------------------


def pack(weight: GroupedRows, device: torch.device) -> tuple[Panels, ...]:
    """A weight on the device, some of its rows at a time. Parts of unlike formats stay apart, one after the other,
    where together they would be much wider. Raises ValueError for groups that the kernels do not take."""
    parts = split_unlike(weight) if isinstance(weight, JoinedRows) else (weight,)
    return tuple(_pack(part, device) for part in parts)


def _pack(weight: GroupedRows, device: torch.device) -> Panels:
    (n, k), format = weight.shape, weight.format
    if format.bits not in (4, 8) or format.group not in (16, 32):
        raise ValueError(f"groups of {format.group} codes of {format.bits} bits cannot be packed")
    packed = _allocate(n, k, format, device)
    piece = max(1, _PIECE_CODES // (_PANEL * k)) * _PANEL
    for first in range(0, n, piece):
        rows = weight.rows(first, min(first + piece, n))
        panels = slice(first // _PANEL, -(-(first + rows.shape[0]) // _PANEL))
        packed.codes[panels].copy_(_code_panels(rows))
        numbers = [rows.scales] if format.zero is not None else [rows.scales, rows.minimums]
        for kept, of_rows in enumerate(numbers):
            upper, lower = _narrow(_scale_panels(of_rows, packed.scales.shape[2]), format.scales)
            packed.scales[kept, panels].copy_(upper)
            if packed.lower is not None:
                packed.lower[kept, panels].copy_(lower)
    return packed


def _allocate(n: int, k: int, format: GroupedFormat, device: torch.device) -> Panels:
    groups_of_step = 8 // format.bits
    panels, steps = -(-n // _PANEL), -(-k // (format.group * groups_of_step))
    shape = (2 if format.zero is None else 1, panels, steps * groups_of_step, _PANEL)
    dtype = {"float16": torch.float16, "float24": torch.int16, "float32": torch.float32}[format.scales]
    return Panels(
        codes=torch.empty((panels, steps, _PANEL, format.group), dtype=torch.uint8, device=device),
        scales=torch.empty(shape, dtype=dtype, device=device),
        lower=torch.empty(shape, dtype=torch.uint8, device=device) if format.scales == "float24" else None,
        n=n,
        k=k,
        format=format,
    )


def _code_panels(rows: Grouped) -> Tensor:
    """[panels, steps, 32, group] uint8, filled up with zeros."""
    (n, k), bits, group = rows.shape, rows.format.bits, rows.format.group
    of_step = 8 // bits
    codes = torch.nn.functional.pad(rows.codes, (0, -k % (group * of_step), 0, -n % _PANEL))
    codes = codes.view(-1, _PANEL, codes.shape[1] // (group * of_step), of_step, group)
    joined = codes[..., 0, :] if of_step == 1 else codes[..., 0, :] | codes[..., 1, :] << bits
    return joined.transpose(1, 2)


def _scale_panels(numbers: Tensor, groups: int) -> Tensor:
    """[outputs, its groups] as [panels, groups, 32] float32, filled up with zeros."""
    padded = torch.nn.functional.pad(numbers, (0, groups - numbers.shape[1], 0, -len(numbers) % _PANEL))
    return padded.view(-1, _PANEL, groups).transpose(1, 2)


def _narrow(numbers: Tensor, scales: str) -> tuple[Tensor, Tensor]:
    """What is kept of numbers that are exact in ``scales``; the second only of a float24."""
    if scales != "float24":
        return numbers, numbers
    bits = (numbers * _F24_UNIT).contiguous().view(torch.int32)
    float24 = (bits >> 8 & 0x800000) | (bits >> 6 & 0x7FFFFF)
    return float24 >> 8, float24 & 0xFF


# --- launchers -----------------------------------------------------------------------------------------------------


def linear(x: Tensor, parts: tuple[Panels, ...], bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias`` with W in x's dtype, sums in float32. x: [T, k], its rows contiguous; bias: [n] of x's dtype.
    Returns [T, n]."""
    n = sum(part.n for part in parts)
    if x.shape[1] != parts[0].k or x.stride(1) != 1:
        raise ValueError(f"x must be [T, {parts[0].k}] with contiguous rows, not {tuple(x.shape)} {x.stride()}")
    out = x.new_empty((x.shape[0], n))
    first = 0
    for part in parts:
        if x.shape[0]:
            _linear(x, part, None if bias is None else bias[first : first + part.n], out[:, first : first + part.n])
        first += part.n
    return out


def _linear(x: Tensor, weight: Panels, bias: Tensor | None, out: Tensor) -> None:
    num_rows, format = x.shape[0], weight.format
    tile = _tile(num_rows, x.dtype)
    steps, column_tiles = weight.codes.shape[1], triton.cdiv(weight.n, tile.block_n)
    splits = _num_splits(column_tiles, steps, gpu_properties(x.device)) if tile is _FEW else 1
    steps_per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_per_split)
    sums = out if splits == 1 else x.new_empty((splits, num_rows, weight.n), dtype=torch.float32)
    launch(
        grouped_linear_kernel,
        (triton.cdiv(num_rows, tile.block_m), column_tiles, splits),
        x,
        weight.codes,
        weight.scales,
        weight.lower,
        bias if splits == 1 else None,
        sums,
        num_rows,
        weight.k,
        weight.n,
        steps,
        steps_per_split,
        weight.scales[0].numel(),
        x.stride(0),
        sums.stride(-2),
        0 if splits == 1 else sums.stride(0),
        BITS=format.bits,
        GROUP=format.group,
        ZERO=format.zero,
        PANEL=_PANEL,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if splits > 1:
        grid = num_rows, triton.cdiv(weight.n, _SUMS)
        launch(
            add_splits_kernel, grid, sums, bias, out, weight.n, splits, sums.stride(0), sums.stride(1), out.stride(0),
            BLOCK=_SUMS,
        )  # fmt: skip


def _tile(num_rows: int, dtype: torch.dtype) -> _ProductTile:
    if num_rows <= _FEW.block_m:
        return _FEW
    if dtype == torch.float32:
        return _FULL
    return _SOME if num_rows <= _SOME.block_m else _MANY


def _num_splits(tiles: int, steps: int, properties: GPUProperties) -> int:
    wanted = _PROGRAMS_PER_SM * properties.num_sms // tiles
    return max(1, min(wanted, steps // _FEWEST_STEPS))


def embedding(parts: tuple[Panels, ...], ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Rows of a weight of one part, times scale. ids: [T] int64, each in [0, n). Returns [T, k]."""
    (table,) = parts
    out = torch.empty((ids.shape[0], table.k), dtype=dtype, device=ids.device)
    if out.numel():
        format = table.format
        launch(
            grouped_embedding_kernel,
            (ids.shape[0], triton.cdiv(table.k, _BLOCK)),
            ids,
            table.codes,
            table.scales,
            table.lower,
            out,
            table.k,
            table.codes.shape[1],
            table.scales[0].numel(),
            float(scale),
            BITS=format.bits,
            GROUP=format.group,
            ZERO=format.zero,
            PANEL=_PANEL,
            BLOCK=_BLOCK,
        )
    return out


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model whose linears and table may be of any of the shape's formats."""
    heads = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    inner = (1 + shape.gated) * shape.intermediate_size
    sizes = (
        (heads, shape.hidden_size),
        (shape.hidden_size, shape.num_heads * shape.head_dim),
        (inner, shape.hidden_size),
        (shape.hidden_size, shape.intermediate_size),
        (shape.vocab_size, shape.hidden_size),
    )
    ids = torch.empty(2, dtype=torch.int64, device="meta")

    def calls() -> None:
        for format in shape.weight_formats:
            for n, k in sizes:
                weight = (_allocate(n, k, format, torch.device("meta")),)
                for rows in (1, _FEW.block_m + 1, _SOME.block_m + 1):
                    x = torch.empty((rows, k), dtype=shape.dtype, device="meta")
                    linear(x, weight)
                    linear(x, weight, x.new_empty(n))
            embedding(weight, ids, shape.dtype, shape.embedding_scale)

    yield from record(properties, calls)
