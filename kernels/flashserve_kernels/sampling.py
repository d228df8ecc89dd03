"""From logits to token ids, in :class:`Stage`'s order.

Min-p is relative to the most probable token; top-k keeps tokens tied with the k-th; top-p is over the renormalised
rest, and keeps tokens tied with its last one, so that a request's candidates do not depend on the order in which a sort
left equal logits.
"""

from __future__ import annotations

from enum import IntFlag, auto

import torch
from torch import Tensor

from flashserve_kernels.noise import gumbel_noise


class Stage(IntFlag):
    """What may be done to a row of logits, in the order in which all ops do it. It is vLLM's:

    1. what changes the logits of greedy rows, too: rows keep to their grammar or their list of allowed tokens
       (``Ops.mask_logits_``), tokens are ruled out (bad words; ``Ops.mask_tokens_``), then biases are added, then
       penalties for repetition, frequency and presence, then for repeated sequences (DRY);
    2. a row of temperature 0 takes the most probable token of these logits, and is done;
    3. RANDOM: the others divide by their temperature; with XTC their top choices are excluded;
    4. MIN_P, TOP_K, TOP_P: the tail of the distribution is cut off;
    5. RANDOM: a token is drawn from what is left.

    A step says which stages any of its rows needs, and ops do no other. What 1 says, and XTC, is no stage but ops of
    their own before the sampling (:mod:`flashserve_kernels.penalties`). Log-probabilities, when there are any, are
    those before the first stage.
    """

    RANDOM = auto()
    MIN_P = auto()
    TOP_K = auto()
    TOP_P = auto()


_HEAD = 1024  # top-p's cut nearly always lies here; a full sort of 49k logits takes 8 times as long


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each row. logits: [R, V], any dtype. Returns [R] int64."""
    # A float32 argmax runs at twice the speed of a bfloat16 one on a CPU, the conversion included.
    return logits.float().argmax(-1)


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
    """One token per row: greedy where its slot's temperature is 0, else :func:`sample`; neither changes the other's.

    logits: [R, V]; slots, positions: [R] int64. By slot: temperature, min_p, top_p float32; top_k, seed int64. Returns
    [R] int64.
    """
    if Stage.RANDOM not in stages:
        return greedy(logits)
    random = temperature[slots] > 0
    tokens = greedy(logits) if not bool(random.all()) else torch.empty_like(positions)
    rows = random.nonzero()[:, 0]
    own = slots[rows]
    if rows.numel():
        tokens[rows] = sample(
            logits[rows],
            temperature[own],
            min_p[own] if Stage.MIN_P in stages else None,
            top_k[own] if Stage.TOP_K in stages else None,
            top_p[own] if Stage.TOP_P in stages else None,
            seed[own],
            positions[rows],
        )
    return tokens


def mask_tokens_(logits: Tensor, rows: Tensor, tokens: Tensor) -> Tensor:
    """Rule out single tokens: ``logits[rows[i], tokens[i]] = -inf``, in place. rows, tokens: [N] int64."""
    return logits.index_put_((rows, tokens), torch.full((), float("-inf"), dtype=logits.dtype, device=logits.device))


def sample(
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """One token per row, drawn with the noise of (seed, position, token) alone.

    logits: [R, V], any dtype; temperature: [R] > 0, float32; min_p: [R] float32, 0 is off; top_k: [R] int64, 0 is
    off; top_p: [R] float32 in (0, 1], 1 is off; None where no row uses it; seeds, positions: [R] int64.
    Returns [R] int64.
    """
    scores = logits.float() / temperature[:, None]
    if min_p is not None:
        floor = scores.amax(-1) + min_p.log()  # p >= min_p * p_max, as logarithms; log 0 rules nothing out
        scores.masked_fill_(scores < floor[:, None], float("-inf"))
    if top_k is not None or top_p is not None:
        scores.masked_fill_(scores < _lowest_kept(scores, top_k, top_p)[:, None], float("-inf"))
    tokens = torch.arange(scores.shape[1], dtype=torch.int32, device=scores.device)
    return scores.add_(gumbel_noise(seeds, positions, tokens)).argmax(-1)


def _lowest_kept(scores: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """The smallest score of each row that survives top-k, then top-p. Returns [R]."""
    vocab = scores.shape[1]
    threshold = scores.new_full((scores.shape[0],), float("-inf"))
    head_size = _HEAD if top_p is not None else 1
    if top_k is not None:
        head_size = max(head_size, int(top_k.max()))
    head = scores.topk(min(head_size, vocab)).values
    if top_k is not None:
        last = (top_k - 1).clamp(0, head.shape[1] - 1)
        kth = head.gather(1, last[:, None])[:, 0]
        threshold = torch.where(top_k > 0, kth, threshold)
    if top_p is None:
        return threshold
    kept = scores.masked_fill(scores < threshold[:, None], float("-inf"))
    log_total = kept.logsumexp(-1, keepdim=True)
    while True:
        probabilities = (head - log_total).exp_().masked_fill_(head < threshold[:, None], 0)
        mass_before = probabilities.cumsum(-1) - probabilities
        inside = mass_before < top_p[:, None]
        # If even the last of the head is inside, the cut may lie beyond it; p = 1 has no cut.
        if head.shape[1] == vocab or not bool((inside[:, -1] & (top_p < 1)).any()):
            break
        head = scores.sort(-1, descending=True).values
    count = inside.sum(-1).clamp_(min=1)
    lowest = head.gather(1, count[:, None] - 1)[:, 0]
    return torch.where(top_p < 1, torch.maximum(threshold, lowest), threshold)
