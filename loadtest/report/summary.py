"""A run in numbers, plain enough for JSON."""

from __future__ import annotations

import math
import time
from typing import Any

from ..histogram import Histogram
from ..outcome import Outcome, error_rate, judge
from ..scrape import COUNTERS, GAUGES
from ..statistics import MEASURES, Phase

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}
TOKEN_MEASURES = ("prompt_tokens", "output_tokens")

DEFINITIONS = {
    "TTFT": "from the planned arrival to the first chunk that carries text or a token; role chunks, keep-alives and "
    "empty deltas do not count. In a closed loop the planned arrival is when the request was sent. A request that was "
    "cut off before its first token counts with the time that it had waited.",
    "ITL": "each gap between two chunks that carry tokens, stamped when their bytes arrived. Where a chunk carries "
    "several tokens, ITL per token is the gap divided by them, counted once for each; tools differ in which they call "
    "ITL. It is missing where the server does not tell how many tokens a chunk holds.",
    "TPOT": "per request: (end - first token) / (output tokens - 1). Its mean over requests is not the mean of the "
    "gaps.",
    "E2E": "from the planned arrival to the end of the answer, of requests that were answered.",
    "Tokens": "from the server's usage, never counted by chunks.",
    "Goodput": "answered requests per second whose own TTFT and TPOT are within the objectives' limits for p99 TTFT "
    "and p99 ITL; without objectives, all that were answered.",
    "Steady state": "requests planned between the first and the last tenth of the measured time; their gaps and "
    "tokens go with them. Rates count what happened in the whole seconds of that time. The edges are shown and left "
    "out, the warm-up is apart.",
    "Lateness": "how long after its planned time a request was sent: the load generator's own delay, which is part of "
    "TTFT and E2E.",
    "Percentiles": "from logarithmic buckets, 1.1% off at most; counts, sums, least and greatest are exact.",
    "Failed": "no complete answer. Requests that the load itself cancels or gives little patience are counted apart.",
}


def summarise(outcome: Outcome) -> dict[str, Any]:
    """Times in seconds. Numbers that do not exist are null."""
    missed = judge(outcome)
    settings = outcome.settings
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(outcome.began)),
        "options": {
            **{flag: value for flag, value in settings.words.items() if value not in (None, False)},
            "--seed": outcome.seed,
            "targets": [f"{target.url} ({target.protocol}, weight {target.weight:g})" for target in settings.targets],
            "loop": "open loop" if settings.is_open else f"closed loop of {outcome.users} users",
            "processes": outcome.processes,
        },
        "measured_s": settings.schedule.duration_s,
        "steady_s": outcome.steady_s,
        "rates": {
            "planned requests/s": plain(outcome.rate("planned")),
            "sent requests/s": plain(outcome.rate("sent")),
            "answered requests/s": plain(outcome.rate("finished")),
            "goodput requests/s": plain(outcome.rate("good")),
            "output tokens/s": plain(outcome.rate("tokens")),
        },
        "error_rate": error_rate(outcome.steady),
        "objectives_missed": missed,
        "has_objectives": any(
            value is not None for value in (settings.objectives.p99_ttft_s, settings.objectives.p99_itl_s,
                                            settings.objectives.error_rate)
        ),
        "warnings": outcome.warnings,
        "whole": _phase(outcome.statistics.whole),
        "phases": {name: _phase(phase) for name, phase in outcome.statistics.phases.items()},
        "protocols": {name: _phase(phase) for name, phase in outcome.statistics.targets.items()},
        "errors": dict(outcome.statistics.messages.most_common(20)),
        "generator_lag": describe(outcome.statistics.lag),
        "server": _server(outcome),
        "histograms": {name: outcome.steady.measures[name].to_json() for name in MEASURES},
        "definitions": DEFINITIONS,
    }  # fmt: skip


def _phase(phase: Phase) -> dict[str, Any]:
    return {
        "counts": dict(phase.counts),
        "errors": dict(phase.errors),
        "measures": {name: describe(histogram) for name, histogram in phase.measures.items()},
    }


def describe(histogram: Histogram) -> dict[str, Any]:
    quantiles = {name: plain(histogram.quantile(share)) for name, share in QUANTILES.items()}
    ends = {"min": plain(histogram.least), "max": plain(histogram.greatest)}
    return {"count": histogram.count, "mean": plain(histogram.mean), **quantiles, **ends}


def plain(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if math.isfinite(value) else None


def _server(outcome: Outcome) -> dict[str, Any]:
    """What its counters gained between the first and the last look, and its gauges' greatest values."""
    samples = outcome.server
    if len(samples) < 2:
        return {}
    gained = {name: samples[-1][name] - samples[0][name] for name in COUNTERS
              if name in samples[0] and name in samples[-1]}  # fmt: skip
    peaks = {f"peak {name}": max(sample.get(name, 0.0) for sample in samples) for name in GAUGES}
    return {"from_s": samples[0]["at_s"], "to_s": samples[-1]["at_s"], **gained, **peaks}


def per_second(outcome: Outcome) -> list[dict[str, Any]]:
    """A row per second of the run, up to the last answer."""
    statistics, schedule = outcome.statistics, outcome.settings.schedule
    by_second = {int(sample["at_s"] // 1): sample for sample in outcome.server}
    rows = []
    for at in range(max(statistics.seconds, default=-1) + 1):
        second = statistics.second(at)
        counts, server = second.counts, by_second.get(at, {})
        rows.append({
            "second": at,
            "phase": schedule.phase(at) if at < schedule.end_s else "drain",
            **{name: counts[name] for name in ("planned", "sent", "finished", "left", "failed")},
            "tokens": round(counts["tokens"], 3),
            **{f"ttft_{name}_s": plain(second.ttft.quantile(QUANTILES[name])) for name in ("p50", "p99")},
            **{f"itl_{name}_s": plain(second.itl.quantile(QUANTILES[name])) for name in ("p50", "p99")},
            **{f"server_{name}": server.get(name) for name in GAUGES},
        })  # fmt: skip
    return rows
