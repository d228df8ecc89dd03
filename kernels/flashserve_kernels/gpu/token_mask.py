"""Tokens that a row may not choose: see :mod:`flashserve_kernels.token_mask`.

Bound by memory: a bit is read per logit and only what is ruled out is written, 2 bytes per logit of 16 bits at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.token_mask import check, num_words

_BLOCK = 4096


@triton.jit(do_not_specialize=["words"])
def mask_logits_kernel(logits_ptr, bits_ptr, rows_ptr, logits_stride, words, vocab, BLOCK: tl.constexpr):
    masked = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_vocab = token < vocab
    word = tl.load(bits_ptr + masked * words + token // 32, in_vocab, other=-1)
    row = tl.load(rows_ptr + masked)
    ruled_out = ((word >> (token % 32)) & 1) == 0
    tl.store(logits_ptr + row * logits_stride + token, float("-inf"), in_vocab & ruled_out)


def mask_logits_(logits: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
    """As :func:`flashserve_kernels.token_mask.mask_logits_`."""
    check(logits, bits, rows)
    vocab = logits.shape[1]
    if rows.numel():
        grid = (rows.numel(), triton.cdiv(vocab, _BLOCK))
        launch(
            mask_logits_kernel, grid, logits, bits, rows, logits.stride(0), bits.shape[1], vocab,
            BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return logits


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever this launcher starts for a model, with logits of its dtype or float32."""

    def calls() -> None:
        rows = torch.empty(2, dtype=torch.int64, device="meta")
        bits = torch.empty((2, num_words(shape.vocab_size)), dtype=torch.int32, device="meta")
        for dtype in dict.fromkeys((shape.dtype, torch.float32)):
            mask_logits_(torch.empty((2, shape.vocab_size), dtype=dtype, device="meta"), bits, rows)

    yield from record(properties, calls)
