"""What requests want changed in logits before they are sampled: biases, penalties, and the exclusion of top choices.

Ops on a step's logits in place, between the model and the sampling: a step whose rows want none of them runs none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.noise import random_bits


def add_bias_(logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> Tensor:
    """``logits[rows[i], tokens[i]] += values[i]``, in place; a pair may occur several times, -inf rules a token out.

    logits: [N, V]; rows, tokens: [B] int64; values: [B] float32. Returns logits.
    """
    return logits.index_put_((rows, tokens), values.to(logits.dtype), accumulate=True)


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
    used = slots >= 0
    one = counts.new_ones(int(used.sum()))
    return counts.index_put_((slots[used], tokens[used]), one, accumulate=True)


_XTC_TOKEN = -1  # no token's own: the draw for a row is independent of those for its tokens


def exclude_top_choices_(
    logits: Tensor,
    rows: Tensor,
    temperature: Tensor,
    probability: Tensor,
    threshold: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """XTC, in place: with ``probability``, rules out all tokens of at least ``threshold`` but the least likely of them.

    As in llama.cpp and text-generation-webui, so that a row of fewer than two such tokens stays as it is; tokens tied
    with the least likely one stay. Whether it happens is decided by the noise of (seed, position), so a seeded text
    comes out again. Nothing is read on the host.

    logits: [N, V]; rows: [M] int64, all different; temperature > 0, probability, threshold: [M] float32; seeds,
    positions: [M] int64. Returns logits.
    """
    own = logits[rows]
    likelihood = (own.float() / temperature[:, None]).softmax(-1)
    is_top = likelihood >= threshold[:, None]
    least = likelihood.masked_fill(~is_top, float("inf")).amin(-1, keepdim=True)
    token = torch.full((1,), _XTC_TOKEN, dtype=torch.int32, device=logits.device)
    draw = (random_bits(seeds, positions, token).to(torch.float64) + 2.0**31) * 2.0**-32
    excluded = is_top & (likelihood > least) & (draw < probability[:, None])
    return logits.index_put_((rows,), own.masked_fill(excluded, float("-inf")))
