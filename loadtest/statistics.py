"""What a run adds up to. Two processes' statistics merge by addition, whole or in parts of a second."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .histogram import Histogram
from .record import PLANNED, UNFINISHED, Record

# What is measured: name and words, for every phase and for the report.
MEASURES = {
    "ttft": "time to first token",
    "itl": "gap between chunks with tokens",
    "itl_per_token": "that gap divided by the tokens that it brought",
    "tpot": "time per output token of a request",
    "e2e": "whole request",
    "lateness": "sent after the planned time",
    "prompt_tokens": "prompt tokens of a request",
    "output_tokens": "output tokens of a request",
}
# counts of a phase: requests (all), finished, left (the load's own cancellations), failed, good (met every objective),
# prompt_tokens, output_tokens (of all, as far as they came), not_told (answers without usage)
EDGE_SHARE = 0.1
WARMUP, EDGE, STEADY = PHASES = ("warmup", "edge", "steady")


@dataclass(frozen=True)
class Schedule:
    """When a run measures, in seconds from its start."""

    warmup_s: float
    duration_s: float

    @property
    def end_s(self) -> float:
        return self.warmup_s + self.duration_s

    @property
    def steady(self) -> tuple[float, float]:
        """From and to: without the first and the last tenth."""
        edge = EDGE_SHARE * self.duration_s
        return self.warmup_s + edge, self.end_s - edge

    def phase(self, at_s: float) -> str:
        """Of a request that was planned for then."""
        if at_s < self.warmup_s:
            return WARMUP
        return STEADY if self.steady[0] <= at_s < self.steady[1] else EDGE


@dataclass(frozen=True)
class Objectives:
    """What a user of the server would call good; None: nothing asked."""

    p99_ttft_s: float | None = None
    p99_itl_s: float | None = None
    error_rate: float | None = None

    def met_by(self, record: Record) -> bool:
        """Whether this request counts as goodput: its first token and its pace (TPOT) are within the limits."""
        if record.error is not None:
            return False
        slow_start = self.p99_ttft_s is not None and record.ttft > self.p99_ttft_s
        return not slow_start and not (self.p99_itl_s is not None and record.tpot > self.p99_itl_s)


@dataclass
class Phase:
    """The requests that were planned for one phase."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    measures: dict[str, Histogram] = field(default_factory=lambda: {name: Histogram() for name in MEASURES})

    def add(self, record: Record, objectives: Objectives) -> None:
        counts, measures = self.counts, self.measures
        counts["requests"] += 1
        measures["lateness"].add(record.sent - record.planned)
        if record.error is None:
            counts["finished"] += 1
            measures["e2e"].add(record.e2e)
            if record.output_tokens is None:
                counts["not_told"] += 1
        else:
            counts["left" if record.error in PLANNED else "failed"] += 1
            self.errors[record.error] += 1
        if record.chunks:
            measures["ttft"].add(record.ttft)
        elif record.error == UNFINISHED:
            # Left out, the requests that waited longest would vanish from the percentiles. It is a lower bound.
            measures["ttft"].add(record.end - record.planned)
        for gap, tokens in record.gaps:
            measures["itl"].add(gap)
            if tokens:
                measures["itl_per_token"].add(gap / tokens, tokens)
        counts["prompt_tokens"] += record.prompt_tokens or 0
        counts["output_tokens"] += record.output_tokens or 0
        if record.prompt_tokens:
            measures["prompt_tokens"].add(record.prompt_tokens)
        if record.error is None and record.output_tokens:
            measures["output_tokens"].add(record.output_tokens)
        if record.error is None and (tpot := record.tpot) == tpot:
            measures["tpot"].add(tpot)
        counts["good"] += objectives.met_by(record)

    def merge(self, other: Phase) -> None:
        self.counts.update(other.counts)
        self.errors.update(other.errors)
        for name, histogram in other.measures.items():
            self.measures[name].merge(histogram)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(self.counts),
            "errors": dict(self.errors),
            "measures": {name: histogram.to_json() for name, histogram in self.measures.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Phase:
        measures = {name: Histogram.from_json(value) for name, value in data["measures"].items()}
        return cls(Counter(data["counts"]), Counter(data["errors"]), measures)


@dataclass
class Second:
    """What happened in one second of the run."""

    counts: Counter[str] = field(default_factory=Counter)
    """planned, sent, finished, left, failed, good, chunks, tokens."""
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)

    def merge(self, other: Second) -> None:
        self.counts.update(other.counts)
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)


@dataclass
class Statistics:
    """Of a run, or of what a part of it did since the last look."""

    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in PHASES})
    targets: dict[str, Phase] = field(default_factory=dict)
    """The steady phase once more, by the protocol that was used; filled only where there are several."""
    seconds: dict[int, Second] = field(default_factory=dict)
    lag: Histogram = field(default_factory=Histogram)
    """How late the load generator's own event loop came back from a sleep."""
    messages: Counter[str] = field(default_factory=Counter)
    """The first words of errors."""

    def second(self, at_s: float) -> Second:
        return self.seconds.setdefault(int(at_s // 1), Second())

    def add(self, record: Record, start: float, schedule: Schedule, objectives: Objectives) -> None:
        """A request that has ended; ``start`` is the run's start on the record's clock."""
        phase = schedule.phase(record.planned - start)
        self.phases[phase].add(record, objectives)
        if phase == STEADY:
            self.targets.setdefault(record.target, Phase()).add(record, objectives)
        self.second(record.planned - start).counts["planned"] += 1
        self.second(record.sent - start).counts["sent"] += 1
        ending = "finished" if record.error is None else "left" if record.error in PLANNED else "failed"
        self.second(record.end - start).counts[ending] += 1
        self.second(record.end - start).counts["good"] += objectives.met_by(record)
        if ending == "failed":
            self.messages[f"{record.error}: {record.message[:160]}"] += 1
        self._add_chunks(record, start)

    def _add_chunks(self, record: Record, start: float) -> None:
        told = sum(tokens or 0 for _, tokens in record.chunks)
        # Where only the usage at the end is known, its tokens are spread evenly over the chunks.
        share = (record.output_tokens or 0) / len(record.chunks) if record.chunks and not told else 0.0
        before = None
        for time_s, tokens in record.chunks:
            second = self.second(time_s - start)
            second.counts["chunks"] += 1
            second.counts["tokens"] += tokens or share  # type: ignore[assignment]
            if before is None:
                second.ttft.add(record.ttft)
            else:
                second.itl.add(time_s - before)
            before = time_s

    def merge(self, other: Statistics) -> None:
        for name, phase in other.phases.items():
            self.phases[name].merge(phase)
        for name, phase in other.targets.items():
            self.targets.setdefault(name, Phase()).merge(phase)
        for at, second in other.seconds.items():
            self.seconds.setdefault(at, Second()).merge(second)
        self.lag.merge(other.lag)
        self.messages.update(other.messages)

    @property
    def whole(self) -> Phase:
        """All phases together."""
        total = Phase()
        for phase in self.phases.values():
            total.merge(phase)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "phases": {name: phase.to_json() for name, phase in self.phases.items()},
            "targets": {name: phase.to_json() for name, phase in self.targets.items()},
            "seconds": [
                [at, dict(second.counts), second.ttft.to_json(), second.itl.to_json()]
                for at, second in sorted(self.seconds.items())
            ],
            "lag": self.lag.to_json(),
            "messages": dict(self.messages),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Statistics:
        return cls(
            {name: Phase.from_json(value) for name, value in data["phases"].items()},
            {name: Phase.from_json(value) for name, value in data["targets"].items()},
            {
                at: Second(Counter(counts), Histogram.from_json(ttft), Histogram.from_json(itl))
                for at, counts, ttft, itl in data["seconds"]
            },
            Histogram.from_json(data["lag"]),
            Counter(data["messages"]),
        )
