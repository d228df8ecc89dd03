"""What was found on a GPU: written to a file after every figure. Imports no torch."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.results import one_line, rounded

TRACEBACK_LINES = 6


class OutOfTime(Exception):
    """The budget does not hold what comes next."""


class Budget:
    """Seconds that may be spent."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    @property
    def left_s(self) -> float:
        return self._end - self._clock()

    def require(self, seconds: float, what: str) -> None:
        """Raises OutOfTime unless that much is left."""
        if self.left_s < seconds:
            raise OutOfTime(f"{what} takes about {seconds:.0f} s and {max(0.0, self.left_s):.0f} s are left")


@dataclass
class Report:
    """Figures by section. Every ``put`` writes the file anew, so that whatever ends the run loses nothing."""

    file: Path
    facts: dict[str, Any]
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    say: Callable[[str], None] = print

    def put(self, section: str, name: str, value: Any) -> None:
        """Keep a figure, or a mapping of some."""
        self.sections.setdefault(section, {})[name] = value
        self.write()

    @classmethod
    def resume(cls, file: Path, say: Callable[[str], None] = print) -> Report:
        """The report that another process wrote, to go on with it. Raises FileNotFoundError."""
        facts = json.loads(file.read_text(encoding="utf-8"))
        return cls(file, facts, facts.pop("sections"), say)

    def get(self, section: str, name: str) -> Any:
        """A figure of before, or None where it is missing."""
        return self.sections.get(section, {}).get(name)

    @property
    def ceilings(self) -> tuple[float, float] | None:
        """The device's bytes and FLOP per second, once both are measured."""
        bandwidth, flops = (self.get("ceilings", name) for name in ("copy_bytes_s", "gemm_flop_s"))
        return (bandwidth, flops) if bandwidth and flops else None

    def attempt(self, section: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keep and return a figure, or how it failed: that is its own, and no other's. OutOfTime passes."""
        try:
            found = measure()
        except OutOfTime:
            raise
        except Exception as error:
            found = failure_of(error)
        self.put(section, name, found)
        return found

    def run(self, section: str, function: Callable[[], None]) -> None:
        """Run a section. What goes wrong in it is kept with the other figures and ends nothing else."""
        started = time.monotonic()
        self.say(f"== {section}")
        try:
            function()
        except OutOfTime as error:
            self.put(section, "skipped", str(error))
            self.say(f"   skipped the rest: {error}")
        except Exception as error:
            self.put(section, "failure", failure_of(error))
            self.say(f"   FAILED: {type(error).__name__}: {one_line(str(error))}")
        self.put(section, "seconds", round(time.monotonic() - started, 1))

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.facts, "sections": rounded(self.sections)}, indent=1, allow_nan=False)
        partial = self.file.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.file)


def failure_of(error: BaseException) -> dict[str, Any]:
    """What a failed measurement leaves in the report."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    tail = "".join(lines).strip().splitlines()[-TRACEBACK_LINES:]
    return {"error": f"{type(error).__name__}: {one_line(str(error))}", "traceback": tail}


def busy_share(intervals: Sequence[tuple[float, float]]) -> float:
    """Share of the time from the first start to the last end that at least one interval (start, end) covers."""
    ordered = sorted(intervals)
    if not ordered:
        return 0.0
    busy, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / (reached - ordered[0][0]) if reached > ordered[0][0] else 0.0


def profile_figures(events: Sequence[dict[str, Any]], steps: int) -> dict[str, Any]:
    """Of a chrome trace: the share of the time in which no kernel runs (copies beside the kernels are no work of the
    device), kernels per step, and those that take longest."""
    found = [event for event in events if event.get("cat") == "kernel" and "dur" in event]
    if not found:
        return {"idle": None, "why": "the profiler saw no kernel"}
    kernels: dict[str, float] = {}
    for event in found:
        name = str(event["name"])[:80]
        kernels[name] = kernels.get(name, 0.0) + event["dur"]
    total = sum(kernels.values())
    longest = sorted(kernels.items(), key=lambda item: -item[1])[:12]
    return {
        "idle": 1.0 - busy_share([(event["ts"], event["ts"] + event["dur"]) for event in found]),
        "kernels_per_step": len(found) / steps,
        "longest": {name: {"us_per_step": us / steps, "of_all": us / total} for name, us in longest},
    }


@dataclass(frozen=True)
class Verdict:
    """What a run says of a goal."""

    verdict: Literal["met", "missed", "not measured"]
    found: str = ""
    """The figure beside its bound, or why there is none."""


@dataclass(frozen=True)
class Target:
    """A figure to reach on one H200 in bfloat16."""

    text: str
    section: str
    name: str
    key: str
    goal: float
    at_least: bool = True

    def judge(self, sections: Mapping[str, Mapping[str, Any]]) -> Verdict:
        """From the figures of a report."""
        figure = sections.get(self.section, {}).get(self.name)
        value = figure.get(self.key) if isinstance(figure, dict) else None
        if not isinstance(value, (int, float)):
            return Verdict("not measured", figure.get("error", "") if isinstance(figure, dict) else "")
        met = value >= self.goal if self.at_least else value <= self.goal
        return Verdict("met" if met else "missed", f"{value:.4g} {'≥' if self.at_least else '≤'} {self.goal:g}")

    def line(self, report: Report) -> str:
        found = self.judge(report.sections)
        # A failed bound reads "6 ≤ 5": the verdict in capitals says that it does not hold.
        mark = found.verdict.upper() if found.verdict == "missed" else found.verdict
        return f"   {mark:<12} {found.found:<18} {self.text}"


_8B, _MANY = "qwen3-8b", "throughput 256 x 128/1024"
_STRIDED = "decode 64 x 4096 of 36 layers"
TARGETS = (
    Target("batch-1 decode of the 8B shape / copy bandwidth", _8B, "decode 1 x 1024 graphs", "of_copy", 0.82),
    Target(
        "decode attention, batch 64, 4k, 36 layers' stride / copy bandwidth", "attention", _STRIDED, "of_ceiling", 0.85
    ),
    Target("prefill attention, 8k, head size 128, TFLOP/s", "attention", "prefill 8192", "tflop_s", 450),
    Target("256 x 128/1024 on the 8B shape, output tokens/s", _8B, _MANY, "tokens_s", 15000),
    Target("GPU idle at batch 256", _8B, "idle 256 x 1024", "idle", 0.05, at_least=False),
    Target("CPU ms per step at batch 256", _8B, _MANY, "cpu_ms_per_step", 1.0, at_least=False),
)
