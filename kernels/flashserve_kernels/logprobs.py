"""Log-probabilities of chosen tokens, their ranks, and the most probable tokens beside them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MAX_TOP = 20
"""The most alternatives that are given for one row."""


class Logprobs(NamedTuple):
    """Natural logarithms of probabilities, for N rows."""

    chosen: Tensor
    """[N] float32."""
    rank: Tensor
    """[N] int64: 1 plus the number of more probable tokens."""
    top: Tensor
    """[N, n] float32, falling."""
    top_tokens: Tensor
    """[N, n] int64; of equal ones the lower token first."""


def log_probabilities(logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """Of softmax(logits): each row's token and the ``num_top`` most probable ones.

    logits: [N, V], any dtype; tokens: [N] int64. Raises ValueError unless num_top is in 0 .. min(20, V).
    """
    check_num_top(num_top, logits.shape[1])
    every = logits.float().log_softmax(-1)
    chosen = every.gather(1, tokens[:, None])
    rank = (logits > logits.gather(1, tokens[:, None])).sum(-1) + 1
    order = every.sort(dim=-1, descending=True, stable=True)
    return Logprobs(chosen[:, 0], rank, order.values[:, :num_top], order.indices[:, :num_top])


def check_num_top(num_top: int, vocab_size: int) -> None:
    """Raises ValueError for a number of alternatives that cannot be given."""
    most = min(MAX_TOP, vocab_size)
    if not 0 <= num_top <= most:
        raise ValueError(f"num_top must be 0 to {most}, not {num_top}")
