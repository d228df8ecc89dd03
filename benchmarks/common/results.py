"""Where results lie, how they are written, and figures with their spread."""

from __future__ import annotations

import json
import math
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def slug(text: str) -> str:
    """ "NVIDIA H200" → "nvidia-h200"; what stands in brackets is left out."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)", "", text.lower())).strip("-")


def result_folder(question: str) -> Path:
    return ROOT / "benchmarks" / question / "results"


def cpu_result(folder: Path, machine: dict[str, Any], name: str) -> Path:
    """``<folder>/<cpu>-<n>-cores/<date>-<name>.json``, of what describe_machine() says; its folder is made."""
    machine_folder = folder / f"{slug(machine['cpu'])}-{machine['cores']}-cores"
    machine_folder.mkdir(parents=True, exist_ok=True)
    return machine_folder / f"{time.strftime('%Y-%m-%d-%H%M')}-{name}.json"


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def one_line(text: str, most: int = 160) -> str:
    """A text on one line, cut where it is too long for a table."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 3] + "..."


def rounded(value: Any) -> Any:
    """Four digits are more than any of these figures has. A number that JSON cannot hold becomes its name."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    return value


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which that share of them lies, in whole percents, interpolated as numpy does."""
    if len(values) < 2:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[round(100 * share) - 1]


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def text(self, digits: int = 0, scale: float = 1.0) -> str:
        low, median, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low}-{high})"
