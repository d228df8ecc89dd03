"""DRY ("don't repeat yourself"): which tokens would go on with a sequence that the text already holds.

The sampler of text-generation-webui and llama.cpp: a token that would extend a repetition of n tokens loses
``multiplier · base^(n - allowed_length)``, if n is at least ``allowed_length``. A repetition ends at a breaker.
"""

from __future__ import annotations

import numpy as np

from flashserve.protocol import SamplingParams

MAX_MATCH = 50
"""Longer repetitions count as this long; bounds the time that a text of one token takes."""


def dry_penalties(known: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """What to add to which logits: (tokens [K] int64, values [K] float32).

    known: [T] int64, prompt and output. Takes a pass over them, and one over the repetitions for each token of the
    longest.
    """
    breakers = params.dry_breaker_ids
    ends = np.flatnonzero(known[:-1] == known[-1])  # where the text held its last token before
    if known[-1] in breakers or not ends.size:
        return np.zeros(0, np.int64), np.zeros(0, np.float32)
    ends = ends[~np.isin(known[ends + 1], breakers)]
    lengths = np.ones(len(ends), np.int64)
    going_on = np.arange(len(ends))
    for back in range(1, min(MAX_MATCH, len(known))):
        token = known[-1 - back]
        if token in breakers:
            break
        going_on = going_on[ends[going_on] >= back]
        going_on = going_on[known[ends[going_on] - back] == token]
        if not going_on.size:
            break
        lengths[going_on] += 1
    long_enough = lengths >= params.dry_allowed_length
    tokens, places = np.unique(known[ends[long_enough] + 1], return_inverse=True)
    longest = np.zeros(len(tokens), np.int64)
    np.maximum.at(longest, places, lengths[long_enough])
    values = -params.dry_multiplier * params.dry_base ** (longest - params.dry_allowed_length).astype(np.float64)
    return tokens, values.astype(np.float32)
