"""Searches the highest rate of arrivals at which a server still meets its objectives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .arrivals import MAX_RATE

CLOSE_ENOUGH = 1.05
"""The search ends when a rate that is met and one that is missed are that near."""


@dataclass(frozen=True)
class Trial:
    """One run. ``missed`` is empty where the rate was held."""

    rate: float
    missed: tuple[str, ...]
    report: dict[str, Any] = field(default_factory=dict, compare=False)


def parse_range(text: str) -> tuple[float, float]:
    """``LOW-HIGH`` in requests per second. Raises ValueError with what is wrong."""
    low_text, _, high_text = text.partition("-")
    try:
        low, high = float(low_text), float(high_text)
    except ValueError:
        raise ValueError(f"{text!r}: must be LOW-HIGH, in requests per second") from None
    if not 0.01 <= low < high <= MAX_RATE:
        raise ValueError(f"{text!r}: must go from at least 0.01 up to at most {MAX_RATE:,.0f} requests per second")
    return low, high


def find_rate(run: Callable[[float], Trial], low: float, high: float) -> list[Trial]:
    """Doubles from ``low`` until a rate is missed or ``high`` is met, then halves what is in between.

    Halves by ratio: 10 to 40 is tried at 20, as far from both. Returns all trials in their order.
    """
    trials, met, missed, rate = [], 0.0, math.inf, low
    while True:
        trial = run(rate)
        trials.append(trial)
        if trial.missed:
            missed = min(missed, rate)
        else:
            met = max(met, rate)
        if met == 0.0 or met >= high or missed / met <= CLOSE_ENOUGH:
            return trials
        rate = min(high, met * 2) if missed == math.inf else math.sqrt(met * missed)


def best_of(trials: list[Trial]) -> float | None:
    """The highest rate that was held; None if not even the lowest was."""
    return max((trial.rate for trial in trials if not trial.missed), default=None)
