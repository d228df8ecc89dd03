"""Which tokens a row may choose, as bits: 32 tokens in an int32, the lowest bit first, as llguidance has them."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 32


def num_words(vocab: int) -> int:
    """How many int32 a row of ``vocab`` tokens takes."""
    return -(-vocab // BITS)


def mask_logits_(logits: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
    """``logits[rows[m], t] = -inf`` for each token t whose bit in ``bits[m]`` is 0, in place.

    logits: [N, V]; bits: [M, at least V / 32] int32; rows: [M] int64, all different. Returns logits.
    """
    check(logits, bits, rows)
    allowed = (bits[:, :, None] >> torch.arange(BITS, dtype=torch.int32, device=bits.device)) & 1
    allowed = allowed.flatten(1)[:, : logits.shape[1]].bool()
    return logits.index_copy_(0, rows, logits[rows].masked_fill_(~allowed, float("-inf")))


def check(logits: Tensor, bits: Tensor, rows: Tensor) -> None:
    """Raises ValueError for what is of another form."""
    if logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(f"logits must be [N, V] with adjacent columns, not {tuple(logits.shape)} {logits.stride()}")
    if rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous int64, not {rows.dtype} {tuple(rows.shape)}")
    if bits.dtype != torch.int32 or bits.dim() != 2 or bits.shape[0] != rows.shape[0] or not bits.is_contiguous():
        raise ValueError(
            f"bits must be contiguous int32 [{rows.shape[0]}, words], not {bits.dtype} {tuple(bits.shape)}"
        )
    if bits.shape[1] < num_words(logits.shape[1]):
        raise ValueError(f"{bits.shape[1]} words of bits are too few for {logits.shape[1]} tokens")
