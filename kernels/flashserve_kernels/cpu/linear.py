"""Products with weights that are packed into panels of 32 columns while loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.elementwise import ACTIVATIONS
from flashserve_kernels.cpu.program import DTYPES, Pool, Rows, emit, empty, rows_of

_PANEL = 32  # gemm.h
_MAX_INT8_K = 2**31 // (255 * 127)  # the sum of products of unsigned and signed bytes stays in 32 bits


@dataclass(frozen=True)
class PackedLinear:
    """A weight [n, k] in the layout of cpu/src/packed.h."""

    memory: Tensor
    n: int
    k: int
    dtype: torch.dtype
    """Of the activations."""
    gated: bool
    """Rows were gate, then up; panels hold 16 of each, for :func:`linear_gated`."""
    quantized: bool
    """int8 with a scale per row of the weight; activations are quantised per token."""

    @property
    def num_bytes(self) -> int:
        return self.memory.numel()


def pack_linear(pool: Pool, weight: Tensor, gated: bool = False, quantize: bool = False) -> PackedLinear:
    """Pack a weight [n, k]; the caller drops the original. Its rows may be strided.

    gated: gate rows, then as many up rows. quantize: to int8.
    Raises ValueError for a dtype or shape that the kernels do not take.
    """
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"weights of {weight.dtype} cannot be packed")
    if weight.dim() != 2 or (weight.shape[1] > 1 and weight.stride(1) != 1) or 0 in weight.shape:
        raise ValueError(f"a weight must be [n, k] with contiguous rows, not {tuple(weight.shape)}")
    n, k = weight.shape
    if gated and n % 2:
        raise ValueError(f"a gated weight has as many gate rows as up rows; {n} rows are odd")
    if quantize and k > _MAX_INT8_K:
        raise ValueError(f"int8 sums overflow for more than {_MAX_INT8_K} columns, not {k}")
    group = 4 if quantize else 2 if weight.dtype == torch.bfloat16 else 1
    item = 1 if quantize else weight.dtype.itemsize
    panels = -(-(n // 2) // (_PANEL // 2)) if gated else -(-n // _PANEL)
    step = 16 * group
    size = panels * _PANEL * (-(-k // step) * step * item + (8 if quantize else 0))
    memory = pool.arena.allocate(size)
    emit(
        pool, program.PACK_LINEAR, weight.dtype, Rows(program.TOKENS, panels), (weight, memory),
        (k, n, weight.stride(0), gated, DTYPES[torch.int8 if quantize else weight.dtype]),
    )  # fmt: skip
    return PackedLinear(memory, n, k, weight.dtype, gated, quantize)


def linear(
    pool: Pool, x: Tensor, packed: PackedLinear, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """``x @ weight.T + bias``. x: [T, k], rows may be strided; bias: [n]. Returns [T, n] of x's dtype, or float32."""
    if packed.gated:
        raise ValueError("a gated weight is for linear_gated")
    return _linear(pool, x, packed, bias, out_dtype or packed.dtype, packed.n)


def linear_gated(
    pool: Pool, x: Tensor, packed: PackedLinear, activation: Activation, bias: Tensor | None = None
) -> Tensor:
    """``activation(gate) * up`` of ``gate | up = x @ weight.T + bias``. x: [T, k]; bias: [n]. Returns [T, n / 2]."""
    if not packed.gated:
        raise ValueError("linear_gated needs a weight that was packed as gated")
    return _linear(pool, x, packed, bias, packed.dtype, packed.n // 2, ACTIVATIONS[activation])


def _linear(
    pool: Pool,
    x: Tensor,
    packed: PackedLinear,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    columns: int,
    activation: int = 0,
) -> Tensor:
    if x.dtype != packed.dtype or x.dim() != 2 or x.shape[1] != packed.k or (packed.k > 1 and x.stride(1) != 1):
        raise ValueError(
            f"x must be {packed.dtype} [T, {packed.k}] with contiguous rows, not {x.dtype} {tuple(x.shape)}"
        )
    if bias is not None and (bias.dtype != packed.dtype or bias.shape != (packed.n,) or not bias.is_contiguous()):
        raise ValueError(f"the bias must be {packed.dtype} [{packed.n}], not {bias.dtype} {tuple(bias.shape)}")
    if out_dtype not in (packed.dtype, torch.float32):
        raise ValueError(f"the result can be {packed.dtype} or float32, not {out_dtype}")
    rows = rows_of(x)
    operand, scales = _quantize(pool, x, rows) if packed.quantized else (x, None)
    out = empty(rows, (columns,), out_dtype)
    emit(
        pool, program.LINEAR, packed.dtype, rows, (operand, packed.memory, bias, out, scales),
        (
            packed.k, packed.n, operand.stride(0), out.stride(0), packed.gated, DTYPES[out_dtype],
            DTYPES[torch.int8 if packed.quantized else packed.dtype], activation,
        ),
    )  # fmt: skip
    return out


def _quantize(pool: Pool, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Rows as 128 + int8 (uint8), and the scales (float32)."""
    quantized = empty(rows, (-(-x.shape[1] // 64) * 64,), torch.uint8)
    scales = empty(rows, (), torch.float32)
    integers = (x.shape[1], x.stride(0), quantized.stride(0))
    emit(pool, program.QUANTIZE, x.dtype, rows, (x, quantized, scales), integers)
    return quantized, scales
