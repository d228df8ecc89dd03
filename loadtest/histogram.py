"""A histogram with logarithmic buckets: two of them, from two processes, merge by adding."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

# 32 buckets per doubling: a bucket is 2.2% wide, so its middle is at most 1.1% off. From 1 µs to an hour that is
# 1,000 buckets at most, of which a run fills some dozens.
BUCKETS_PER_DOUBLING = 32
# Two tokens that one read brought have no measurable gap; everything below counts as this.
SMALLEST = 1e-6


class Histogram:
    """Counts by bucket, and count, sum, least and greatest exactly."""

    __slots__ = ("buckets", "count", "greatest", "least", "total")

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.least = math.inf
        self.greatest = -math.inf
        for value in values:
            self.add(value)

    def add(self, value: float, times: int = 1) -> None:
        index = math.floor(math.log2(value if value > SMALLEST else SMALLEST) * BUCKETS_PER_DOUBLING)
        self.buckets[index] = self.buckets.get(index, 0) + times
        self.count += times
        self.total += value * times
        if value < self.least:
            self.least = value
        if value > self.greatest:
            self.greatest = value

    def merge(self, other: Histogram) -> None:
        for index, times in other.buckets.items():
            self.buckets[index] = self.buckets.get(index, 0) + times
        self.count += other.count
        self.total += other.total
        self.least = min(self.least, other.least)
        self.greatest = max(self.greatest, other.greatest)

    @property
    def mean(self) -> float:
        """NaN without values."""
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value that ``share`` of all values do not exceed, 1.1% off at most; NaN without values."""
        if not self.count:
            return math.nan
        wanted = max(1, math.ceil(share * self.count))
        seen = 0
        for index in sorted(self.buckets):
            seen += self.buckets[index]
            if seen >= wanted:
                return min(max(upper_bound(index - 0.5), self.least), self.greatest)
        return self.greatest

    def to_json(self) -> dict[str, Any]:
        """Plain lists and numbers, which JSON and msgpack carry."""
        if not self.count:
            return {}
        pairs = sorted(self.buckets.items())
        return {
            "index": [index for index, _ in pairs],
            "times": [times for _, times in pairs],
            "total": self.total,
            "least": self.least,
            "greatest": self.greatest,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Histogram:
        made = cls()
        if data:
            made.buckets = dict(zip(data["index"], data["times"], strict=True))
            made.count = sum(data["times"])
            made.total, made.least, made.greatest = data["total"], data["least"], data["greatest"]
        return made


def upper_bound(index: float) -> float:
    """Where the bucket of this number ends."""
    return 2.0 ** ((index + 1) / BUCKETS_PER_DOUBLING)
