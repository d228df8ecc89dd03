"""When requests are sent in an open loop: drawn ahead, so that no answer can move them.

Arrivals are drawn at one per unit of time, and that time is then stretched by the rate's course: a ramp or a spike of a
Poisson process is as exact as its constant rate.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

RATE_FORMS = "R, or a course: R@SECONDS or FROM-TO@SECONDS, separated by commas"
ARRIVAL_FORMS = "poisson, constant or gamma:SHAPE (below 1: bursts, 1: poisson, above: steadier)"
MAX_RATE = 100_000.0


@dataclass(frozen=True)
class Segment:
    """A rate that goes from ``first`` to ``last`` requests per second in a straight line."""

    first: float
    last: float
    seconds: float

    @property
    def requests(self) -> float:
        return (self.first + self.last) / 2 * self.seconds

    def when(self, requests: float) -> float:
        """After how many seconds so many have arrived: solves first t + (last - first) t² / 2 seconds = requests."""
        slope = (self.last - self.first) / self.seconds
        if abs(slope) < 1e-12:
            return requests / self.first
        root = math.sqrt(max(0.0, self.first * self.first + 2 * slope * requests))
        return 2 * requests / (self.first + root)  # the form that does not cancel where the slope is small


@dataclass(frozen=True)
class Rate:
    """A course of rates; one without an end holds its rate."""

    segments: tuple[Segment, ...]

    @property
    def seconds(self) -> float:
        """Infinite for a constant rate."""
        return sum(segment.seconds for segment in self.segments)

    def when(self, requests: float) -> float | None:
        """When so many have arrived; None after the end."""
        start = 0.0
        for segment in self.segments:
            if segment.seconds == math.inf:
                return start + requests / segment.first
            if requests <= segment.requests and segment.requests > 0:
                return start + segment.when(requests)
            requests -= segment.requests
            start += segment.seconds
        return None


def parse_rate(text: str) -> Rate:
    """Raises ValueError with what is wrong. `10` for as long as the run lasts, `5-50@60,50@30` for 90 seconds."""
    words = text.split(",")
    segments = []
    try:
        for word in words:
            rates, at, seconds = word.strip().partition("@")
            first, dash, last = rates.partition("-")
            if not at and (dash or len(words) > 1):
                raise ValueError
            ends = float(first), float(last if dash else first)
            segments.append(Segment(*ends, float(seconds.removesuffix("s")) if at else math.inf))
    except ValueError:
        raise ValueError(f"{text!r}: must be {RATE_FORMS}") from None
    for segment in segments:
        if not (0 <= segment.first <= MAX_RATE and 0 <= segment.last <= MAX_RATE):
            raise ValueError(f"{text!r}: rates go from 0 to {MAX_RATE:,.0f} per second")
        if not segment.seconds > 0 or (len(segments) > 1 and segment.seconds == math.inf):
            raise ValueError(f"{text!r}: a part of a course lasts a positive number of seconds")
    if not any(segment.first or segment.last for segment in segments):
        raise ValueError(f"{text!r}: there must be a rate above 0")
    return Rate(tuple(segments))


@dataclass(frozen=True)
class Spacing:
    """How arrivals lie around their rate: constant, or gamma with this shape (1 is a Poisson process)."""

    constant: bool = False
    shape: float = 1.0


def parse_spacing(text: str) -> Spacing:
    """Raises ValueError with the forms that there are."""
    if text in ("poisson", "constant"):
        return Spacing(text == "constant")
    kind, _, number = text.partition(":")
    try:
        shape = float(number)
    except ValueError:
        shape = math.nan
    if kind != "gamma" or not 0.001 <= shape <= 1000:
        raise ValueError(f"{text!r}: must be {ARRIVAL_FORMS}")
    return Spacing(shape=shape)


def plan_arrivals(rate: Rate, spacing: Spacing, seed: int, duration_s: float) -> Iterator[float]:
    """Seconds from the start, ascending, the same for the same seed; ends with the rate's course or the duration."""
    rng = random.Random(f"arrivals {seed}")
    position = -1.0 if spacing.constant else 0.0
    while True:
        position += 1.0 if spacing.constant else rng.gammavariate(spacing.shape, 1.0 / spacing.shape)
        at = rate.when(position)
        if at is None or at >= duration_s:
            return
        yield at
