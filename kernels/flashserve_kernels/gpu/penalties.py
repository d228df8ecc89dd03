"""Repetition, presence and frequency penalties over token counts that stay on the device.

Per slot (a running request's place) there are the counts of the tokens it has generated, and which tokens its prompt
holds. 4 bytes read and written per logit of float32, 5 more for the counts and the prompt; rows without penalties
return after three loads, so that one launch serves every row of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

_BLOCK = 2048
_ROWS = 128


@triton.jit
def penalties_kernel(
    logits_ptr,
    counts_ptr,
    in_prompt_ptr,
    slots_ptr,
    repetition_ptr,
    presence_ptr,
    frequency_ptr,
    logits_stride,
    counts_stride,
    in_prompt_stride,
    vocab,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    repetition = tl.load(repetition_ptr + row)
    presence = tl.load(presence_ptr + row)
    frequency = tl.load(frequency_ptr + row)
    if (slot >= 0) & ((repetition != 1.0) | (presence != 0.0) | (frequency != 0.0)):
        token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        mask = token < vocab
        at = logits_ptr + row * logits_stride + token
        x = tl.load(at, mask, other=0.0).to(tl.float32)
        count = tl.load(counts_ptr + slot * counts_stride + token, mask, other=0)
        in_prompt = tl.load(in_prompt_ptr + slot * in_prompt_stride + token, mask, other=0)
        repeated = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
        x = tl.where((count > 0) | (in_prompt != 0), repeated, x)
        x -= frequency * count.to(tl.float32)
        x -= tl.where(count > 0, presence, 0.0)
        tl.store(at, x.to(logits_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_rows"])
def count_tokens_kernel(counts_ptr, slots_ptr, tokens_ptr, counts_stride, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, row < num_rows, other=-1).to(tl.int64)
    mask = slot >= 0
    token = tl.load(tokens_ptr + row, mask, other=0)
    tl.atomic_add(counts_ptr + slot * counts_stride + token, 1, mask, sem="relaxed")


def apply_penalties_(
    logits: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """As :func:`flashserve_kernels.penalties.apply_penalties_`."""
    num_rows, vocab = logits.shape
    if num_rows:
        launch(
            penalties_kernel,
            (num_rows, triton.cdiv(vocab, _BLOCK)),
            logits,
            counts,
            in_prompt.view(torch.uint8),
            slots,
            repetition,
            presence,
            frequency,
            logits.stride(0),
            counts.stride(0),
            in_prompt.stride(0),
            vocab,
            BLOCK=_BLOCK,
        )
    return logits


def count_tokens_(counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """As :func:`flashserve_kernels.penalties.count_tokens_`."""
    num_rows = slots.numel()
    if num_rows:
        grid = (triton.cdiv(num_rows, _ROWS),)
        launch(count_tokens_kernel, grid, counts, slots, tokens, counts.stride(0), num_rows, BLOCK=_ROWS)
    return counts


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model."""

    def calls() -> None:
        ids = torch.empty(2, dtype=torch.int64, device="meta")
        numbers = torch.empty(2, dtype=torch.float32, device="meta")
        counts = torch.empty((2, shape.vocab_size), dtype=torch.int32, device="meta")
        in_prompt = torch.empty((2, shape.vocab_size), dtype=torch.bool, device="meta")
        for dtype in dict.fromkeys((shape.dtype, torch.float32)):
            logits = torch.empty((2, shape.vocab_size), dtype=dtype, device="meta")
            apply_penalties_(logits, ids, counts, in_prompt, numbers, numbers, numbers)
        count_tokens_(counts, ids, ids)

    yield from record(properties, calls)
