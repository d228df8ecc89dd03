"""A run that has ended: what was asked for, what was counted, and whether it is good."""

from __future__ import annotations

from dataclasses import dataclass, field

from .settings import Settings
from .statistics import STEADY, Phase, Statistics

FELL_BEHIND_S = 0.02
"""Requests that leave that late, at their 99th percentile, or an event loop that comes back that late."""


@dataclass
class Outcome:
    settings: Settings
    statistics: Statistics
    server: list[dict[str, float]]
    """Samples of /metrics: seconds from the start, and values by name."""
    began: float
    """Unix time."""
    seed: int
    lasted_s: float
    processes: int = 1
    lost_processes: int = 0
    users: int = 0
    """Of a closed loop."""
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.warnings = [*self.warnings, *_doubts(self)]

    @property
    def steady(self) -> Phase:
        return self.statistics.phases[STEADY]

    @property
    def steady_s(self) -> float:
        first, last = self.settings.schedule.steady
        return last - first

    def rate(self, name: str) -> float:
        """Of what happened (`Second.counts`) in the steady seconds, per second. NaN where there is no whole second."""
        first, last = self.settings.schedule.steady
        whole = range(int(-(-first // 1)), int(last // 1))
        if not whole:
            return float("nan")
        seconds = self.statistics.seconds
        return sum(seconds[at].counts[name] for at in whole if at in seconds) / len(whole)


def error_rate(phase: Phase) -> float:
    """Failed requests by all that were planned."""
    return phase.counts["failed"] / phase.counts["requests"] if phase.counts["requests"] else 0.0


def judge(outcome: Outcome) -> list[str]:
    """The objectives that the steady phase missed, in words."""
    objectives, phase, missed = outcome.settings.objectives, outcome.steady, []
    for name, limit in (("ttft", objectives.p99_ttft_s), ("itl", objectives.p99_itl_s)):
        found = phase.measures[name].quantile(0.99)
        if limit is not None and not found <= limit:  # NaN: nothing came, which is not within any limit
            missed.append(f"p99 {name} {found * 1000:.1f} ms, asked for {limit * 1000:g} ms")
    if objectives.error_rate is not None and (found := error_rate(phase)) > objectives.error_rate:
        missed.append(f"{found:.2%} of requests failed, asked for {objectives.error_rate:.2%}")
    return missed


def _doubts(outcome: Outcome) -> list[str]:
    """What makes the figures less than they seem."""
    statistics, found = outcome.statistics, []
    late = outcome.steady.measures["lateness"].quantile(0.99)
    lag = statistics.lag.quantile(0.99)
    if late > FELL_BEHIND_S or lag > FELL_BEHIND_S:
        found.append(
            f"The load generator fell behind: p99 of its lateness is {max(0.0, late) * 1000:.0f} ms, of its event "
            f"loop {lag * 1000:.0f} ms. Use more processes (--processes), a machine apart from the server, or less "
            "load."
        )
    if outcome.lost_processes:
        found.append(f"{outcome.lost_processes} of {outcome.processes} processes did not report to the end.")
    if outcome.lasted_s < outcome.settings.schedule.end_s - 0.5:
        found.append(f"The run was ended after {outcome.lasted_s:.0f} s of {outcome.settings.schedule.end_s:.0f}.")
    if unfinished := statistics.whole.errors["unfinished"]:
        found.append(
            f"{unfinished} requests still ran at the end and count as failed; the time that they had waited for a "
            "first token is in TTFT as a lower bound."
        )
    if not_told := statistics.whole.counts["not_told"]:
        found.append(f"For {not_told} answers the server told no usage: their tokens are not counted.")
    settings = outcome.settings
    if settings.metrics_url is not None and not outcome.server:
        found.append(
            f"{settings.metrics_url} told nothing about {settings.model}, so the server's own view is missing "
            "(--metrics-url says where it is, or none)."
        )
    if 0 < outcome.steady.counts["requests"] < 100:
        found.append(f"The p99 rests on {outcome.steady.counts['requests']} requests: on one of them.")
    return found
