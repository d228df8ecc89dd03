"""Matrix products whose rows do not depend on how many there are: one tile and one order of sums, whatever the batch.

cuBLAS chooses tiles and splits by the number of rows, so that a row's last bits follow its neighbours (He et al.,
"Defeating Nondeterminism in LLM Inference", 2025). Here a program multiplies 64 rows with 64 outputs, tile after tile
of the inputs, also where there is one row: 64 rows are what Hopper's tensor cores take at once, and at 4 TB/s a
product of 64 rows still waits for the weight (64 operations per byte; an H200 has 200). Prompts pay for the small
tile, and products of few outputs for the programs that are not there (4096 outputs: 64 programs on 132 SMs).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.dot import dot
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

_TILE = 64
_FMA_TILE = 32  # without tensor cores both operands lie in registers


@triton.jit(do_not_specialize=["num_rows"])
def invariant_linear_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]
    bias_ptr,  # None: no bias
    out_ptr,  # [rows, N]
    num_rows,
    num_outputs,
    num_inputs,
    x_stride,
    TILE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (tiles of rows, tiles of outputs): those that share a tile of the weight follow each other."""
    wait_for_inputs(DEPENDENT)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    in_rows, in_columns = row < num_rows, column < num_outputs
    x_rows = x_ptr + (row.to(tl.int64) * x_stride)[:, None]
    weights = weight_ptr + (column.to(tl.int64) * num_inputs)[None, :]
    acc = tl.zeros([TILE, TILE], tl.float32)
    for start in range(0, num_inputs, TILE):
        k = start + tl.arange(0, TILE)
        in_inputs = k < num_inputs
        x = tl.load(x_rows + k[None, :], in_rows[:, None] & in_inputs[None, :], other=0.0)
        weight = tl.load(weights + k[:, None], in_inputs[:, None] & in_columns[None, :], other=0.0)
        acc = dot(x, weight, acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, in_columns, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + (row.to(tl.int64) * num_outputs)[:, None] + column[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), in_rows[:, None] & in_columns[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ W.T + bias``. x: [T, K], rows contiguous; weight: [N, K] contiguous; bias: [N]. Returns [T, N]."""
    num_rows, num_inputs = x.shape
    num_outputs = weight.shape[0]
    if x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"contiguous rows and a contiguous weight, not {x.stride()} and {weight.stride()}")
    out = x.new_empty((num_rows, num_outputs))
    if out.numel():
        tile = _TILE if x.itemsize < 4 else _FMA_TILE
        launch(
            invariant_linear_kernel,
            (triton.cdiv(num_rows, tile), triton.cdiv(num_outputs, tile)),
            x,
            weight,
            bias,
            out,
            num_rows,
            num_outputs,
            num_inputs,
            x.stride(0),
            TILE=tile,
            num_warps=4,
            num_stages=4,  # 16 KB each
        )
    return out


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever the launcher starts for a model: its linears, with biases where models have them."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=shape.dtype, device="meta")

    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
    sizes = [(qkv, hidden), (hidden, heads), ((1 + shape.gated) * inner, hidden), (hidden, inner)]

    def calls() -> None:
        for outputs, inputs in sizes:
            for bias in (None, empty(outputs)):
                linear(empty(2, inputs), empty(outputs, inputs), bias)
        linear(empty(2, hidden), empty(shape.vocab_size, hidden))

    yield from dict.fromkeys(record(properties, calls))
