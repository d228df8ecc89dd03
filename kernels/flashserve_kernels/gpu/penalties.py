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


@triton.jit(do_not_specialize=["vocab"])
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
    """Penalise what was said before, in place, as vLLM does (`vllm/model_executor/layers/utils.py`).

    A token of the prompt or of the output: its logit is divided by ``repetition`` if positive, else multiplied with
    it (Keskar et al., 2019). A token of the output: less ``frequency`` times its count, less ``presence``.

    logits: [N, V], any dtype; slots: [N] int64, negative: no penalties; counts: [S, V] int32, generated tokens;
    in_prompt: [S, V] bool; repetition (1 is off), presence, frequency (0 is off): [N] float32. Returns logits.
    """
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


def apply_penalties_reference_(
    logits: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """:func:`apply_penalties_` in torch."""
    rows = (slots >= 0).nonzero()[:, 0]
    x, count = logits[rows].float(), counts[slots[rows]]
    factor = repetition[rows, None]
    x = torch.where((count > 0) | in_prompt[slots[rows]], torch.where(x > 0, x / factor, x * factor), x)
    x = x - frequency[rows, None] * count - torch.where(count > 0, presence[rows, None], 0)
    logits[rows] = x.to(logits.dtype)
    return logits


def count_tokens_(counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """``counts[slots[r], tokens[r]] += 1`` where ``slots[r] >= 0``; a pair may occur several times.

    counts: [S, V] int32; slots, tokens: [R] int64. Returns counts.
    """
    num_rows = slots.numel()
    if num_rows:
        grid = (triton.cdiv(num_rows, _ROWS),)
        launch(count_tokens_kernel, grid, counts, slots, tokens, counts.stride(0), num_rows, BLOCK=_ROWS)
    return counts


def count_tokens_reference_(counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """:func:`count_tokens_` in torch."""
    used = slots >= 0
    one = counts.new_ones(int(used.sum()))
    return counts.index_put_((slots[used], tokens[used]), one, accumulate=True)


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
