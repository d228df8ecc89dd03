"""From logits to tokens without a sort and without the host: see :mod:`flashserve_kernels.sampling`.

What survives min-p, top-k and top-p is a set "scores at or above a threshold", ties included. One kernel finds the
threshold of each row by bisection: each pass over the row weighs three pivots (how many logits, or how much
probability, lie at or above each), which cuts the interval to a quarter; with 16-bit logits it ends when no number of
their dtype is left between the bounds, typically after 5 passes. The second kernel takes the argmax of score plus
Gumbel noise over slices of the vocabulary, so that few rows also use all SMs; the third joins the slices.

Bytes per logit of 16 bits: greedy 2, bound by memory (85% or more of the copy bandwidth from 64 rows of 128k on);
sampled 2 from memory and about 60 integer and float instructions for the noise, which is what bounds it at large
batches; truncated rows read 2 more per pass, mostly from L2 (a row of 128k logits is 256 KB).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties, gpu_properties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.gpu.noise import gumbel, noise_bits, noise_key
from flashserve_kernels.sampling import Stage

_MAX_SLICES = 64
_SLICE_BLOCK = 4096  # 8 warps, 16 logits per thread
# Stages of a loop over the vocabulary, so that a tile is under way beside the one at work: Triton pipelines loads that
# feed no matrix product only when told, and else a program reads one tile per latency of the memory, 8 KB per µs. It
# can only where a thread's loads are 4 bytes or more: the mask's end, vocab, is specialised to say that it is a
# multiple of 16. Three stages spilled.
_STAGES = tl.constexpr(2)
_ROW_BLOCK = 4096  # 16 warps: half an SM's threads for a row; 8192 spilled 72 bytes per thread on sm_90


@triton.jit
def load_logits(row_ptr, token, vocab):
    """A tile as float32; what lies beyond the vocabulary, and NaN, is -inf."""
    x = tl.load(row_ptr + token, token < vocab, other=float("-inf")).to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def _order(bits):
    """Between float32's bits and integers of the same order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _pivot(low, high, quarter: tl.constexpr, dtype: tl.constexpr):
    """A quarter, half or three quarters of the way, as a number of the logits' dtype.

    By value; but bounds more than 1024 apart (logits masked with float32's lowest number) by the order of floats,
    which needs at most 16 passes where halving 3e38 by value would need 60.
    """
    by_value = low * (1.0 - quarter * 0.25) + high * (quarter * 0.25)
    first = _order(low.to(tl.int32, bitcast=True)).to(tl.int64)
    last = _order(high.to(tl.int32, bitcast=True)).to(tl.int64)
    by_order = _order((first + (last - first) * quarter // 4).to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(high - low > 1024.0, by_order, by_value).to(dtype).to(tl.float32)


@triton.jit
def _cut(row_ptr, vocab, low, high, num_low, num_high, target, top, inverse_t, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number v whose tail (the logits >= v) weighs at least ``target``: logits, or probability mass.

    ``low``'s tail does, with ``num_low`` logits; ``high``'s does not, with ``num_high``.
    """
    dtype: tl.constexpr = row_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    searching = num_low - num_high > 1
    while searching:
        p1 = _pivot(low, high, 1, dtype)
        p2 = _pivot(low, high, 2, dtype)
        p3 = _pivot(low, high, 3, dtype)
        n1 = tl.zeros([BLOCK], tl.int32)
        n2 = tl.zeros([BLOCK], tl.int32)
        n3 = tl.zeros([BLOCK], tl.int32)
        w1 = tl.zeros([BLOCK], tl.float32)
        w2 = tl.zeros([BLOCK], tl.float32)
        w3 = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, vocab, BLOCK, num_stages=_STAGES):
            x = load_logits(row_ptr, start + lane, vocab)
            n1 += (x >= p1).to(tl.int32)
            n2 += (x >= p2).to(tl.int32)
            n3 += (x >= p3).to(tl.int32)
            if MASS:
                mass = tl.exp((x - top) * inverse_t)
                w1 += tl.where(x >= p1, mass, 0.0)
                w2 += tl.where(x >= p2, mass, 0.0)
                w3 += tl.where(x >= p3, mass, 0.0)
        num1, num2, num3 = tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)
        if MASS:
            in1, in2, in3 = tl.sum(w1, 0) >= target, tl.sum(w2, 0) >= target, tl.sum(w3, 0) >= target
        else:
            in1, in2, in3 = num1 >= target, num2 >= target, num3 >= target
        # Nothing between the bounds is left once their middle rounds to one of them.
        searching = (p2 > low) & (p2 < high)
        new_low = tl.where(in3, p3, tl.where(in2, p2, tl.where(in1, p1, low)))
        new_high = tl.where(in3, high, tl.where(in2, p3, tl.where(in1, p2, p1)))
        new_num_low = tl.where(in3, num3, tl.where(in2, num2, tl.where(in1, num1, num_low)))
        num_high = tl.where(in3, num_high, tl.where(in2, num3, tl.where(in1, num2, num1)))
        low, high, num_low = new_low, new_high, new_num_low
        # One logit between the bounds is the last of the tail; a tail of exactly k needs no sharper bound.
        searching = searching & (num_low - num_high > 1)
        if not MASS:
            searching = searching & (num_low != target)
    return low


@triton.jit
def threshold_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,
    min_p_ptr,
    top_k_ptr,
    top_p_ptr,
    out_ptr,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    temperature = tl.load(temperature_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    k = tl.load(top_k_ptr + row)
    top_k = tl.where((k > 0) & (k < vocab), k, vocab).to(tl.int32)
    threshold = float("-inf")
    if (temperature > 0) & ((min_p > 0) | (top_k < vocab) | (top_p < 1)):
        lane = tl.arange(0, BLOCK)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        lowest = tl.full([BLOCK], float("inf"), tl.float32)
        num_highest = tl.zeros([BLOCK], tl.int32)
        num_finite = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, vocab, BLOCK, num_stages=_STAGES):
            x = load_logits(row_ptr, start + lane, vocab)
            is_finite = x > float("-inf")
            num_highest = tl.where(x > highest, 1, num_highest + ((x == highest) & is_finite).to(tl.int32))
            highest = tl.maximum(highest, x)
            lowest = tl.minimum(lowest, tl.where(is_finite, x, float("inf")))
            num_finite += is_finite.to(tl.int32)
        top = tl.max(highest, 0)
        num_top = tl.sum(tl.where(highest == top, num_highest, 0), 0)
        num_low = tl.sum(num_finite, 0)
        low = tl.min(lowest, 0)
        if num_low > 0:
            if min_p > 0:
                threshold = tl.div_rn(top, temperature) + tl.log(min_p)
            inverse_t = 1.0 / temperature
            if top_k <= num_top:
                low = top
            elif top_k < num_low:
                low = _cut(row_ptr, vocab, low, top, num_low, num_top, top_k, top, inverse_t, False, BLOCK)
            threshold = tl.maximum(threshold, tl.div_rn(low, temperature))
            if top_p < 1:
                base = tl.minimum(tl.maximum(low, threshold * temperature), top)
                mass = tl.zeros([BLOCK], tl.float32)
                count = tl.zeros([BLOCK], tl.int32)
                for start in tl.range(0, vocab, BLOCK, num_stages=_STAGES):
                    x = load_logits(row_ptr, start + lane, vocab)
                    mass += tl.where(x >= base, tl.exp((x - top) * inverse_t), 0.0)
                    count += (x >= base).to(tl.int32)
                target = top_p * tl.sum(mass, 0)
                if num_top >= target:
                    threshold = tl.div_rn(top, temperature)
                else:
                    num_base = tl.sum(count, 0)
                    low = _cut(row_ptr, vocab, base, top, num_base, num_top, target, top, inverse_t, True, BLOCK)
                    # A cut that took nothing leaves the threshold as it was, not as base's rounding has it.
                    threshold = tl.where(low > base, tl.div_rn(low, temperature), threshold)
    tl.store(out_ptr + row, threshold)


@triton.jit(do_not_specialize=["slice_blocks", "num_slices"])
def argmax_kernel(
    logits_ptr,
    logits_stride,
    temperature_ptr,  # None: every row is greedy, and the next three are None too
    threshold_ptr,
    seeds_ptr,
    positions_ptr,
    best_ptr,
    best_token_ptr,
    vocab,
    slice_blocks,  # of BLOCK tokens: loads of 16 bytes want to know that each begins at a multiple of 16
    num_slices,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    slice_size = slice_blocks * BLOCK
    first = part * slice_size
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_token = tl.minimum(first + lane, vocab - 1)
    temperature = 0.0
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + row)
        threshold = tl.load(threshold_ptr + row)
        key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    for start in tl.range(first, tl.minimum(first + slice_size, vocab), BLOCK, num_stages=_STAGES):
        token = start + lane
        x = load_logits(logits_ptr + row * logits_stride, token, vocab)
        if temperature_ptr is not None:  # noqa: SIM102 - the first is known when compiling, the second is not
            if temperature > 0:
                x = tl.div_rn(x, temperature)
                x = tl.where(x >= threshold, x + gumbel(noise_bits(key, token)), float("-inf"))
        best_token = tl.where(x > best, token, best_token)
        best = tl.maximum(best, x)
    top = tl.max(best, 0)
    tl.store(best_ptr + row * num_slices + part, top)
    # Of equal scores the lowest token, as torch's argmax has it.
    tl.store(best_token_ptr + row * num_slices + part, tl.min(tl.where(best == top, best_token, vocab - 1), 0))


@triton.jit(do_not_specialize=["num_slices"])
def join_slices_kernel(best_ptr, best_token_ptr, out_ptr, num_slices, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < num_slices
    best = tl.load(best_ptr + row * num_slices + part, mask, other=float("-inf"))
    token = tl.load(best_token_ptr + row * num_slices + part, mask, other=0x7FFFFFFF)
    tl.store(out_ptr + row, tl.min(tl.where(best == tl.max(best, 0), token, 0x7FFFFFFF), 0).to(tl.int64))


def slices(num_rows: int, vocab: int, num_sms: int) -> tuple[int, int]:
    """Slices of a row's vocabulary, and tokens per slice: two programs per SM while the rows are few."""
    blocks = triton.cdiv(vocab, _SLICE_BLOCK)
    wanted = min(triton.cdiv(2 * num_sms, num_rows), blocks, _MAX_SLICES)
    size = triton.cdiv(blocks, wanted) * _SLICE_BLOCK
    return triton.cdiv(vocab, size), size


def thresholds(logits: Tensor, temperature: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The score (logit divided by temperature) at and above which a row's tokens stay; -inf for a greedy row.

    Arguments as in :func:`sample`. Returns [N] float32.
    """
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        launch(
            threshold_kernel,
            (num_rows,),
            logits,
            logits.stride(0),
            temperature,
            min_p,
            top_k,
            top_p,
            out,
            vocab,
            BLOCK=_ROW_BLOCK,
            num_warps=16,
        )
    return out


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row, of equal ones the lowest. logits: [N, V], any dtype. Returns [N] int64."""
    return _argmax(logits, None, None, None, None)


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token per row: greedy where the temperature is 0, else a sample with the noise of (seed, position, token).

    logits: [N, V], any dtype, unchanged; temperature, min_p (0 is off), top_p (1 is off): [N] float32; top_k: [N]
    int64 (0 is off); None where no row uses it; seeds, positions: [N] int64. All on the device, and nothing is read
    back, so a CUDA graph can hold it for whatever parameters its rows will have. Returns [N] int64.
    """
    if min_p is None and top_k is None and top_p is None:
        threshold = torch.full_like(temperature, float("-inf"))
    else:
        min_p = torch.zeros_like(temperature) if min_p is None else min_p
        top_k = torch.zeros_like(positions) if top_k is None else top_k
        top_p = torch.ones_like(temperature) if top_p is None else top_p
        threshold = thresholds(logits, temperature, min_p, top_k, top_p)
    return _argmax(logits, temperature, threshold, seeds, positions)


def sample_rows(
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    stages: Stage,
    *,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
) -> Tensor:
    """As :func:`flashserve_kernels.sampling.sample_rows`."""
    if Stage.RANDOM not in stages:
        return greedy(logits)

    def own(column: Tensor) -> Tensor:
        return column.index_select(0, slots)

    return sample(
        logits,
        own(temperature),
        own(min_p) if Stage.MIN_P in stages else None,
        own(top_k) if Stage.TOP_K in stages else None,
        own(top_p) if Stage.TOP_P in stages else None,
        own(seed),
        positions,
    )


def _argmax(
    logits: Tensor,
    temperature: Tensor | None,
    threshold: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return out
    num_slices, slice_size = slices(num_rows, vocab, gpu_properties(logits.device).num_sms)
    best = torch.empty((num_rows, num_slices), dtype=torch.float32, device=logits.device)
    best_token = torch.empty((num_rows, num_slices), dtype=torch.int32, device=logits.device)
    launch(
        argmax_kernel,
        (num_rows, num_slices),
        logits,
        logits.stride(0),
        temperature,
        threshold,
        seeds,
        positions,
        best,
        best_token,
        vocab,
        slice_size // _SLICE_BLOCK,
        num_slices,
        BLOCK=_SLICE_BLOCK,
        num_warps=8,
    )
    launch(join_slices_kernel, (num_rows,), best, best_token, out, num_slices, BLOCK=_MAX_SLICES, num_warps=1)
    return out


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model: greedy, sampled, and truncated by any of the three or by all."""

    def calls() -> None:
        ids = torch.empty(2, dtype=torch.int64, device="meta")
        numbers = torch.empty(2, dtype=torch.float32, device="meta")
        for dtype in dict.fromkeys((shape.dtype, torch.float32)):
            logits = torch.empty((2, shape.vocab_size), dtype=dtype, device="meta")
            greedy(logits)
            sample(logits, numbers, None, None, None, ids, ids)
            sample(logits, numbers, numbers, ids, numbers, ids, ids)

    yield from record(properties, calls)
