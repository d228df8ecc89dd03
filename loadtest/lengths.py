"""Distributions of prompt and output lengths, in tokens."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

FORMS = "N, uniform:LOW-HIGH or lognormal:MEDIAN,SIGMA[,MAX]"
MAX_TOKENS = 1_000_000


@dataclass(frozen=True)
class Length:
    """``kind`` is fixed (low = high), uniform (both ends included) or lognormal (cut at low and high)."""

    kind: str
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    def draw(self, rng: random.Random) -> int:
        if self.kind == "lognormal":
            return min(self.high, max(self.low, round(rng.lognormvariate(math.log(self.median), self.sigma))))
        return rng.randint(self.low, self.high)


def parse_length(text: str) -> Length:
    """Raises ValueError with the forms that there are."""
    kind, colon, rest = text.strip().partition(":")
    try:
        if not colon:
            length = Length("fixed", int(kind), int(kind))
        elif kind == "uniform":
            ends = rest.partition("-")
            length = Length("uniform", int(ends[0]), int(ends[2]))
        elif kind == "lognormal":
            numbers = [float(number) for number in rest.split(",")]
            median, sigma, high = (*numbers, MAX_TOKENS) if len(numbers) == 2 else numbers
            length = Length("lognormal", 1, int(high), median, sigma)
        else:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r}: must be {FORMS}") from None
    if not 1 <= length.low <= length.high <= MAX_TOKENS:
        raise ValueError(f"{text!r}: lengths go from 1 to {MAX_TOKENS}, the lower first")
    if length.kind == "lognormal" and not (length.median >= 1 and 0 < length.sigma <= 10):
        raise ValueError(f"{text!r}: the median must be at least 1, sigma above 0 and at most 10")
    return length
