"""What is asked of every system. Standard library only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests in the order of their arrival."""

    prompts: list[list[int]]
    outputs: list[int]
    """Tokens that each request asks for, and gets: there is no end token."""
    arrivals: list[float]
    """Seconds after the beginning."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def total_output(self) -> int:
        return sum(self.outputs)

    def head(self, count: int) -> Workload:
        return Workload(self.prompts[:count], self.outputs[:count], self.arrivals[:count])


def equal_lengths(count: int, prompt: int, output: int, vocab_size: int) -> Workload:
    """All at once, all of one length."""
    rng = random.Random(prompt)
    return Workload(_prompts(rng, [prompt] * count, vocab_size), [output] * count, [0.0] * count)


def mixed_lengths(count: int, rate: float | None, vocab_size: int, scale: float = 1.0, seed: int = 0) -> Workload:
    """Prompts of 16 to 256 tokens and outputs of 8 to 128, most of them short (uniform in the logarithm, as lengths of
    chats roughly are). rate: requests per second, at random times (Poisson); None: all at once.

    scale: of all lengths, for quick checks.
    """
    rng = random.Random(seed)

    def lengths(low: int, high: int) -> list[int]:
        return [max(2, round(scale * low * (high / low) ** rng.random())) for _ in range(count)]

    prompts, outputs = _prompts(rng, lengths(16, 256), vocab_size), lengths(8, 128)
    clock, arrivals = 0.0, []
    for _ in range(count):
        arrivals.append(clock)
        clock += rng.expovariate(rate) if rate else 0.0
    return Workload(prompts, outputs, arrivals)


def _prompts(rng: random.Random, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]
