"""Log-probabilities of the chosen and of the most probable tokens, without a log-softmax of the vocabulary.

One kernel reads each slice of a row once: its highest logits, one after the other, the sum of its exponentials, and
how many logits are above the chosen one's. A second joins the slices. 2 bytes per logit of 16 bits; the repeated
maxima (up to 20 per slice, in registers) are what bounds it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.gpu.sampling import load_logits
from flashserve_kernels.logprobs import MAX_TOP, Logprobs, check_num_top

_SLICE = 4096
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _take_highest(x, token):
    """The highest number of a tile, the lowest of its tokens, and the tile without them."""
    value = tl.max(x, 0)
    best = tl.min(tl.where(x == value, token, _NO_TOKEN), 0)
    is_best = token == best
    return value, best, tl.where(is_best, float("-inf"), x), tl.where(is_best, _NO_TOKEN, token)


@triton.jit(do_not_specialize=["num_top", "num_slices"])
def slice_kernel(
    logits_ptr,
    tokens_ptr,
    sums_ptr,  # [N, 3, slices]: highest logit, sum of exponentials relative to it, logits above the chosen one
    top_ptr,  # [N, slices * num_top]
    top_tokens_ptr,
    logits_stride,
    vocab,
    num_top,
    num_slices,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * logits_stride
    x = load_logits(row_ptr, token, vocab)
    chosen = tl.load(row_ptr + tl.load(tokens_ptr + row)).to(tl.float32)
    highest = tl.max(x, 0)
    shift = tl.where(highest > float("-inf"), highest, 0.0)
    sums_at = sums_ptr + row * 3 * num_slices + part
    tl.store(sums_at, highest)
    tl.store(sums_at + num_slices, tl.sum(tl.exp(x - shift), 0))
    tl.store(sums_at + 2 * num_slices, tl.sum((x > chosen).to(tl.float32), 0))  # exact: at most BLOCK
    candidate = (row * num_slices + part) * num_top
    for i in range(num_top):
        value, best, x, token = _take_highest(x, token)
        tl.store(top_ptr + candidate + i, value)
        tl.store(top_tokens_ptr + candidate + i, best)


@triton.jit(do_not_specialize=["num_top", "num_slices"])
def join_logprobs_kernel(
    logits_ptr,
    tokens_ptr,
    sums_ptr,
    top_ptr,
    top_tokens_ptr,
    chosen_ptr,
    rank_ptr,
    out_top_ptr,
    out_tokens_ptr,
    logits_stride,
    num_top,
    num_slices,
    SLICES: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, SLICES)
    sums_at = sums_ptr + row * 3 * num_slices + part
    in_slices = part < num_slices
    highest = tl.load(sums_at, in_slices, other=float("-inf"))
    total = tl.load(sums_at + num_slices, in_slices, other=0.0)
    above = tl.load(sums_at + 2 * num_slices, in_slices, other=0.0)
    shift = tl.max(highest, 0)
    log_total = shift + tl.log(tl.sum(total * tl.exp(highest - shift), 0))
    chosen = tl.load(logits_ptr + row * logits_stride + tl.load(tokens_ptr + row)).to(tl.float32)
    tl.store(chosen_ptr + row, chosen - log_total)
    tl.store(rank_ptr + row, tl.sum(above.to(tl.int32), 0).to(tl.int64) + 1)
    candidate = tl.arange(0, CANDIDATES)
    in_candidates = candidate < num_slices * num_top
    first = row * num_slices * num_top
    x = tl.load(top_ptr + first + candidate, in_candidates, other=float("-inf"))
    token = tl.load(top_tokens_ptr + first + candidate, in_candidates, other=_NO_TOKEN)
    for i in range(num_top):
        value, best, x, token = _take_highest(x, token)
        tl.store(out_top_ptr + row * num_top + i, value - log_total)
        tl.store(out_tokens_ptr + row * num_top + i, best.to(tl.int64))


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """As :func:`flashserve_kernels.logprobs.log_probabilities`. Nothing is read back to the host."""
    num_rows, vocab = logits.shape
    check_num_top(num_top, vocab)
    num_slices = triton.cdiv(vocab, _SLICE)

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=logits.device)

    result = Logprobs(
        chosen=empty(num_rows),
        rank=empty(num_rows, dtype=torch.int64),
        top=empty(num_rows, num_top),
        top_tokens=empty(num_rows, num_top, dtype=torch.int64),
    )
    if num_rows == 0:
        return result
    sums = empty(num_rows, 3, num_slices)
    top = empty(num_rows, num_slices * MAX_TOP)  # room for any num_top: its pointer must not depend on it
    top_tokens = empty(num_rows, num_slices * MAX_TOP, dtype=torch.int32)
    launch(
        slice_kernel,
        (num_rows, num_slices),
        logits,
        tokens,
        sums,
        top,
        top_tokens,
        logits.stride(0),
        vocab,
        num_top,
        num_slices,
        BLOCK=_SLICE,
        num_warps=8,
    )
    launch(
        join_logprobs_kernel,
        (num_rows,),
        logits,
        tokens,
        sums,
        top,
        top_tokens,
        *result,
        logits.stride(0),
        num_top,
        num_slices,
        SLICES=triton.next_power_of_2(num_slices),
        CANDIDATES=triton.next_power_of_2(num_slices * MAX_TOP),
    )
    return result


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever this launcher starts for a model, with logits of its dtype or float32."""

    def calls() -> None:
        tokens = torch.empty(2, dtype=torch.int64, device="meta")
        for dtype in dict.fromkeys((shape.dtype, torch.float32)):
            log_probabilities(torch.empty((2, shape.vocab_size), dtype=dtype, device="meta"), tokens, MAX_TOP)

    yield from record(properties, calls)
