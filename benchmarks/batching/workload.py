"""What is asked of every system. Standard library only."""

from __future__ import annotations

import random

from benchmarks.common.engines import CONTINUOUS, NAIVE, STATIC
from benchmarks.common.protocol import Requests, random_prompts

OURS, SERVED = "flashserve", "flashserve-served"
SYSTEMS = (NAIVE, STATIC, CONTINUOUS, OURS, SERVED)
"""The compared engines, in the order of the tables."""


def mixed_lengths(count: int, rate: float | None, vocab_size: int, scale: float = 1.0, seed: int = 0) -> Requests:
    """Prompts of 16 to 256 tokens and outputs of 8 to 128, most of them short (uniform in the logarithm, as lengths of
    chats roughly are). rate: requests per second, at random times (Poisson); None: all at once.

    scale: of all lengths, for quick checks.
    """
    rng = random.Random(seed)

    def lengths(low: int, high: int) -> list[int]:
        return [max(2, round(scale * low * (high / low) ** rng.random())) for _ in range(count)]

    prompts, outputs = random_prompts(rng, lengths(16, 256), vocab_size), lengths(8, 128)
    clock, arrivals = 0.0, []
    for _ in range(count):
        arrivals.append(clock)
        clock += rng.expovariate(rate) if rate else 0.0
    return Requests(prompts, outputs, arrivals)
