"""The options of a load test: one table, for `flashserve bench` and for `locust -f`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashserve_client.request import DEFAULT_MODEL

from . import arrivals, lengths
from .arrivals import Rate, Spacing
from .statistics import Objectives, Schedule
from .streams.choose import Target, parse_target
from .traces import Trace, read_trace
from .workload import Prefixes, Trouble, Workload

DEFAULT_DURATION_S = 60.0


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """An argument's type that keeps the words, which Locust sends to its workers, once ``parse`` has taken them."""

    def check(text: str) -> str:
        try:
            parse(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return check


def _number(low: float, high: float = math.inf, whole: bool = False) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            beyond = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
            raise argparse.ArgumentTypeError(f"{text!r}: must be a {'whole ' if whole else ''}number {beyond}")
        return value

    return convert


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r}: must be NAME=VALUE")
    parsed: Any = value
    with contextlib.suppress(ValueError):  # else it is a string
        parsed = json.loads(value)
    if name == "n" and parsed != 1:
        raise ValueError(f"{text!r}: a load test measures one sample of each request")
    return name, parsed


_SHARE = _number(0, 1)
_SECONDS = _number(0, 1e7)
_ABOVE_0 = _number(0.001, 1e7)
_COUNT = _number(1, 1e9, whole=True)

# Flag: keyword arguments of add_argument. What `flashserve bench` and Locust name alike is in neither.
OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"metavar": "NAME", "help": "the model to ask (default: the one that the server has, or "
                f"of several the one that it brings; of OpenAI's, and under Locust alone: {DEFAULT_MODEL})"},
    "--rate": {
        "type": _checked(arrivals.parse_rate), "metavar": "RATE",
        "help": "open loop: requests per second that never wait for answers: "
        f"{arrivals.RATE_FORMS} (default: a closed loop, whose users wait for their answers)",
    },
    "--arrivals": {
        "type": _checked(arrivals.parse_spacing), "metavar": "KIND",
        "help": f"open loop: {arrivals.ARRIVAL_FORMS} (default: poisson)",
    },
    "--trace": {
        "type": _checked(read_trace), "metavar": "FILE",
        "help": "open loop: times and lengths from a file: Azure's LLM inference traces (CSV) or Mooncake's (JSONL)",
    },
    "--trace-speed": {"type": _ABOVE_0, "metavar": "X", "help": "replay a trace X times as fast (default: 1)"},
    "--duration": {
        "type": _ABOVE_0, "metavar": "S",
        "help": f"seconds that count (default: those of the rate's course or the trace, else {DEFAULT_DURATION_S:g})",
    },
    "--warmup": {"type": _SECONDS, "metavar": "S", "default": 0.0,
                 "help": "seconds before those, at the same load, reported apart (default: %(default)s)"},
    "--drain": {"type": _SECONDS, "metavar": "S", "default": 30.0,
                "help": "wait so long for late answers at the end (default: %(default)s)"},
    "--prompt-tokens": {"type": _checked(lengths.parse_length), "metavar": "LENGTH",
                        "help": f"of a prompt, about: {lengths.FORMS} (default: 128)"},
    "--output-tokens": {"type": _checked(lengths.parse_length), "metavar": "LENGTH",
                        "help": "of an answer, in the same forms (default: 64)"},
    "--shared-prefix": {"type": _COUNT, "metavar": "TOKENS", "help": "let prompts begin with a text that they share"},
    "--shared-share": {"type": _SHARE, "metavar": "SHARE", "help": "how many of them do, 0 to 1 (default: 1)"},
    "--prefix-groups": {"type": _COUNT, "metavar": "N", "help": "how many such texts there are (default: 1)"},
    "--turns": {"type": _checked(lengths.parse_length), "metavar": "LENGTH",
                "help": "closed loop: turns of a user's conversation, in the same forms; each repeats those before "
                "it with their answers (default: 1)"},
    "--think-time": {"type": _SECONDS, "metavar": "S", "help": "between an answer and the next turn (default: 0)"},
    "--respect-eos": {"action": "store_true",
                      "help": "let the model end its answers, instead of sending ignore_eos for exact lengths"},
    "--param": {"type": _checked(_parameter), "action": "append", "metavar": "NAME=VALUE",
                "help": "a sampling parameter of every request; the value is JSON, or else a string; repeatable"},
    "--seed": {"type": _number(0, 2**63, whole=True), "metavar": "N",
               "help": "the same seed gives the same requests at the same times (default: a new one each time, so that "
               "no prompt is in a cache)"},
    "--timeout": {"type": _ABOVE_0, "metavar": "S", "default": 300.0,
                  "help": "give up on a request after that (default: %(default)s)"},
    "--cancel-share": {"type": _SHARE, "metavar": "SHARE", "default": 0.0,
                       "help": "requests whose client leaves early, 0 to 1 (default: %(default)s)"},
    "--cancel-after": {"type": _COUNT, "metavar": "TOKENS", "help": "when it leaves (default: 8)"},
    "--timeout-share": {"type": _SHARE, "metavar": "SHARE", "default": 0.0,
                        "help": "requests whose client has little patience, 0 to 1 (default: %(default)s)"},
    "--short-timeout": {"type": _ABOVE_0, "metavar": "S", "help": "its patience (default: 1)"},
    "--p99-ttft": {"type": _ABOVE_0, "metavar": "MS", "help": "objective: 99%% of first tokens come within that"},
    "--p99-itl": {"type": _ABOVE_0, "metavar": "MS", "help": "objective: 99%% of gaps between tokens are below that"},
    "--max-error-rate": {"type": _SHARE, "metavar": "SHARE", "help": "objective: at most that share fails, 0 to 1"},
    "--metrics-url": {"metavar": "URL", "default": "auto",
                      "help": "the server's metrics; none: do not look "
                      "(default: port 8002 of the first target's host)"},
    "--report": {"metavar": "FOLDER", "help": "where the report goes (default: a new folder below loadtest-reports)"},
}  # fmt: skip

# An option that means nothing alone: what it needs.
_NEEDS = {
    "arrivals": "rate", "trace_speed": "trace", "shared_share": "shared_prefix", "prefix_groups": "shared_prefix",
    "cancel_after": "cancel_share", "short_timeout": "timeout_share", "think_time": "turns",
}  # fmt: skip
_EXCLUDE = (("trace", "rate"), ("trace", "prompt_tokens"), ("trace", "output_tokens"), ("trace", "shared_prefix"),
            ("turns", "rate"), ("turns", "trace"))  # fmt: skip


def add_options(parser: Any) -> None:
    """To an argparse parser, or to Locust's."""
    for flag, keywords in OPTIONS.items():
        parser.add_argument(flag, **keywords)


@dataclass
class Settings:
    """The options, parsed."""

    targets: tuple[Target, ...]
    model: str
    schedule: Schedule
    workload: Workload
    rate: Rate | None
    spacing: Spacing
    trace: Trace | None
    drain_s: float
    seed: int | None
    objectives: Objectives
    metrics_url: str | None
    report: Path | None
    words: dict[str, Any] = field(default_factory=dict)
    """The options as they were given, for the report."""

    @property
    def is_open(self) -> bool:
        return self.rate is not None or self.trace is not None


def settings_from(options: argparse.Namespace, targets: list[str]) -> Settings:
    """Raises ValueError for options that do not fit together."""
    flag = {name: f"--{name.replace('_', '-')}" for name in vars(options)}
    for name, needed in _NEEDS.items():
        if getattr(options, name) is not None and not getattr(options, needed):
            raise ValueError(f"{flag[name]} needs {flag[needed]}")
    for one, other in _EXCLUDE:
        if getattr(options, one) and getattr(options, other):
            raise ValueError(f"{flag[one]} and {flag[other]} exclude each other")
    parsed = tuple(map(parse_target, targets))
    rate = arrivals.parse_rate(options.rate) if options.rate else None
    trace = read_trace(options.trace).faster(options.trace_speed or 1.0) if options.trace else None
    params = dict(map(_parameter, options.param or ()))
    if not options.respect_eos:
        params.setdefault("ignore_eos", True)
    workload = Workload(
        lengths.parse_length(options.prompt_tokens or "128"),
        lengths.parse_length(options.output_tokens or "64"),
        0,
        Prefixes(options.shared_prefix or 0, _default(options.shared_share, 1.0) if options.shared_prefix else 0.0,
                 options.prefix_groups or 1),
        Trouble(options.cancel_share, options.cancel_after or 8, options.timeout_share, options.short_timeout or 1.0),
        params,
        options.timeout,
        lengths.parse_length(options.turns or "1"),
        options.think_time or 0.0,
    )  # fmt: skip
    return Settings(
        parsed, options.model or DEFAULT_MODEL, Schedule(options.warmup, _duration(options, rate, trace)), workload,
        rate, arrivals.parse_spacing(options.arrivals or "poisson"), trace, options.drain, options.seed,
        Objectives(_seconds(options.p99_ttft), _seconds(options.p99_itl), options.max_error_rate),
        _metrics_url(options.metrics_url, parsed), Path(options.report) if options.report else None,
        {flag[name]: getattr(options, name) for name in vars(options) if flag[name] in OPTIONS},
    )  # fmt: skip


def _default(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _duration(options: argparse.Namespace, rate: Rate | None, trace: Trace | None) -> float:
    ends = [rate.seconds] if rate is not None else [trace.seconds] if trace is not None else []
    limit = min(ends, default=math.inf)
    if limit < math.inf and options.warmup >= limit:
        raise ValueError(f"--warmup {options.warmup:g} leaves nothing of the {limit:g} seconds of the course or trace")
    if options.duration is not None:
        if options.warmup + options.duration > limit:
            raise ValueError(f"--warmup and --duration are longer than the course or trace of {limit:g} seconds")
        return float(options.duration)
    return DEFAULT_DURATION_S if limit == math.inf else limit - float(options.warmup)


def _metrics_url(text: str, targets: tuple[Target, ...]) -> str | None:
    if text == "none":
        return None
    if text == "auto":
        return f"http://{targets[0].host}:8002/metrics"
    if not text.startswith(("http://", "https://")):
        raise ValueError(f"--metrics-url {text!r}: must be http://HOST:PORT/metrics, or none")
    return text
