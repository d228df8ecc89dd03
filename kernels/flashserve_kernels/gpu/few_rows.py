"""Matrix products of a few rows, which wait for the weight: 2 bytes of 16 bits for 2 operations of each row.

A program keeps 16 outputs and streams their part of the weight through tiles of [inputs, 16], a few of them under way;
rows are padded to the 16 that tensor cores take, which costs no bytes. Outputs fewer than two programs per SM are split
along the inputs; the last split to end sums up all in their order (:mod:`flashserve_kernels.gpu.attention_kernel` does
the same). A gated unit keeps the gate and the up projection of its outputs and multiplies them before it writes: one
kernel instead of two, and two numbers less per output in memory.

Whether this or cuBLAS is faster depends on the GPU and on the shape, and nobody knows without measuring:
:class:`FewRows` asks the clock once per shape, when a graph's first run warms up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.gpu.activation import apply_activation
from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.device import GPUProperties, gpu_properties
from flashserve_kernels.gpu.dot import dot
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

MAX_ROWS = 8
_BLOCK_N = 16
_MAX_SPLITS = 16
_BLOCK_BYTES = 512  # of an output's inputs in a tile: 256 numbers of 16 bits
_RUNS = 9
_FLUSHED_BYTES = 128 << 20  # more than an L2 (H200: 50 MB), where a step's weights never are when it needs them


@triton.jit
def _sum_splits(partial_ptr, at, mask, split_stride, num_splits, BLOCK_N: tl.constexpr):
    total = tl.zeros([16, BLOCK_N], tl.float32)
    for split in range(num_splits):
        total += tl.load(partial_ptr + split * split_stride + at, mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_rows", "split_blocks"])
def few_rows_kernel(
    x_ptr,  # [rows, K]
    weight_ptr,  # [N, K]; of a gated unit [2 N, K], gates first
    bias_ptr,  # None: no bias
    out_ptr,  # [rows, N]
    partial_ptr,  # [splits, rows, N or 2 N] float32; None: one split
    arrivals_ptr,  # [tiles] int32, zero between launches; None: one split
    num_rows,
    num_outputs,
    num_inputs,
    split_blocks,  # of BLOCK_K inputs
    x_stride,
    ACTIVATION: tl.constexpr,  # None: no gated unit
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Grid (tiles of outputs, splits)."""
    wait_for_inputs(DEPENDENT)
    row = tl.arange(0, 16)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = row < num_rows, column < num_outputs
    x_rows = x_ptr + (row * x_stride)[:, None]
    weights = weight_ptr + (column.to(tl.int64) * num_inputs)[None, :]
    ups = weights + num_outputs.to(tl.int64) * num_inputs
    acc = tl.zeros([16, BLOCK_N], tl.float32)
    up = tl.zeros([16, BLOCK_N], tl.float32)
    first = tl.program_id(1) * split_blocks * BLOCK_K
    for start in range(first, tl.minimum(first + split_blocks * BLOCK_K, num_inputs), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_inputs = k < num_inputs
        x = tl.load(x_rows + k[None, :], in_rows[:, None] & in_inputs[None, :], other=0.0)
        mask = in_inputs[:, None] & in_columns[None, :]
        acc = dot(x, tl.load(weights + k[:, None], mask, other=0.0), acc)
        if ACTIVATION is not None:
            up = dot(x, tl.load(ups + k[:, None], mask, other=0.0), up)
    mask = in_rows[:, None] & in_columns[None, :]
    if partial_ptr is not None:
        width = num_outputs if ACTIVATION is None else 2 * num_outputs
        at = row[:, None] * width + column[None, :]
        split_stride = num_rows * width
        own = partial_ptr + tl.program_id(1) * split_stride + at
        tl.store(own, acc, mask)
        if ACTIVATION is not None:
            tl.store(own + num_outputs, up, mask)
        tl.debug_barrier()  # all threads' stores come before the count
        arrivals_ptr += tl.program_id(0)
        num_splits = tl.num_programs(1)
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel", scope="gpu") != num_splits - 1:
            return
        tl.store(arrivals_ptr, 0)
        acc = _sum_splits(partial_ptr, at, mask, split_stride, num_splits, BLOCK_N)
        if ACTIVATION is not None:
            up = _sum_splits(partial_ptr + num_outputs, at, mask, split_stride, num_splits, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + column, in_columns, other=0.0).to(tl.float32)[None, :]
        if ACTIVATION is not None:
            up += tl.load(bias_ptr + num_outputs + column, in_columns, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        acc = apply_activation(acc, ACTIVATION) * up
    tl.store(out_ptr + row[:, None] * num_outputs + column[None, :], acc.to(out_ptr.dtype.element_ty), mask)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, arrivals: Tensor, activation: Activation | None = None
) -> Tensor:
    """``x @ W.T + bias`` of at most MAX_ROWS rows, or with an activation the gated unit of that.

    x: [T, K], rows contiguous; weight: [N, K] contiguous, with an activation [2 I, K], gates first; arrivals: from
    ``attention.new_arrivals``. Returns [T, N] or [T, I].
    """
    num_rows, num_inputs = x.shape
    if num_rows > MAX_ROWS or x.stride(1) != 1 or not weight.is_contiguous():
        raise ValueError(f"at most {MAX_ROWS} contiguous rows and a contiguous weight, not {num_rows} {x.stride()}")
    num_outputs = weight.shape[0] // (1 if activation is None else 2)
    out = x.new_empty((num_rows, num_outputs))
    if not out.numel():
        return out
    block_k = _BLOCK_BYTES // x.itemsize if x.itemsize < 4 else 64  # float32 has no tensor cores, but registers
    properties = gpu_properties(x.device)
    splits, split_blocks = _splits(properties, num_outputs, triton.cdiv(num_inputs, block_k))
    tile_bytes = block_k * x.itemsize * (16 + _BLOCK_N * (1 if activation is None else 2))
    partial = None
    if splits > 1:
        partial = torch.empty((splits, num_rows, weight.shape[0]), dtype=torch.float32, device=x.device)
    launch(
        few_rows_kernel,
        (triton.cdiv(num_outputs, _BLOCK_N), splits),
        x,
        weight,
        bias,
        out,
        partial,
        None if partial is None else arrivals,
        num_rows,
        num_outputs,
        num_inputs,
        split_blocks,
        x.stride(0),
        ACTIVATION=activation,
        BLOCK_N=_BLOCK_N,
        BLOCK_K=block_k,
        num_warps=4,
        num_stages=min(4, 1 + properties.shared_memory_bytes // tile_bytes),
    )
    return out


def _splits(properties: GPUProperties, num_outputs: int, blocks: int) -> tuple[int, int]:
    """Splits, and blocks of inputs of each: two programs per SM, as far as the inputs go."""
    tiles = triton.cdiv(num_outputs, _BLOCK_N)
    wanted = min(_MAX_SPLITS, max(1, 2 * properties.num_sms // tiles), blocks)
    size = triton.cdiv(blocks, wanted)
    return triton.cdiv(blocks, size), size


class FewRows:
    """Which products of few rows the kernel computes and which are cuBLAS's: by the clock, once per shape."""

    def __init__(self, arrivals: Tensor, seconds: Callable[[Callable[[], object]], float] | None) -> None:
        """seconds: measures a call on the device; None where there is no device to measure, and all is cuBLAS's."""
        self._arrivals = arrivals
        self._seconds = seconds
        self._faster: dict[tuple[object, ...], bool] = {}

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: Activation | None,
        other: Callable[[], Tensor],
    ) -> Tensor:
        """As :func:`linear` or, where that is as fast, ``other()``, which computes the same."""

        def own() -> Tensor:
            return linear(x, weight, bias, self._arrivals, activation)

        if self._seconds is None or not 0 < x.shape[0] <= MAX_ROWS:
            return other()
        key = (*weight.shape, weight.dtype, bias is None, activation, (x.shape[0] - 1).bit_length())
        if key not in self._faster:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return other()  # a capture can measure nothing; the run before it has, unless its rows were others
            self._faster[key] = self._seconds(own) < self._seconds(other)
        return own() if self._faster[key] else other()


def seconds_on(device: torch.device, call: Callable[[], object]) -> float:
    """The median time of a call whose operands are not in the GPU's L2, on the current stream."""
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.int8, device=device)
    times = []
    for _ in range(_RUNS + 1):
        flushed.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])  # the first compiled the kernel


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever the launcher starts for a model: its linears, with biases where models have them."""

    def empty(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=shape.dtype, device="meta")

    hidden, inner, heads = shape.hidden_size, shape.intermediate_size, shape.num_heads * shape.head_dim
    qkv = heads + 2 * shape.num_kv_heads * shape.head_dim
    arrivals = torch.empty(16, dtype=torch.int32, device="meta")

    def call(outputs: int, inputs: int, with_bias: bool, activation: Activation | None = None) -> None:
        bias = empty(outputs) if with_bias else None
        linear(empty(2, inputs), empty(outputs, inputs), bias, arrivals, activation)

    def calls() -> None:
        for with_bias in (False, True):
            call(qkv, hidden, with_bias)
            call(hidden, heads, with_bias)
            if shape.gated:
                call(2 * inner, hidden, with_bias, shape.activation)
            else:
                call(inner, hidden, with_bias)
            call(hidden, inner, with_bias)
        call(shape.vocab_size, hidden, False)

    yield from dict.fromkeys(record(properties, calls))
