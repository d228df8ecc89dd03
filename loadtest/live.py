"""Runs Locust as a child and shows what it counts, once a second, until its report is there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from .interface import FAILED, INTERRUPTED, VIEW_FD
from .settings import Settings
from .statistics import Statistics

PLAIN_EVERY_S = 5  # without a terminal: a line that often
_REPORT = re.compile(r"report: (\S.*)$", re.MULTILINE)
_ERROR = re.compile(r"/ERROR/loadtest: (.*)$", re.MULTILINE)


def watch_run(words: list[str], settings: Settings, brief: bool = False) -> int:
    """Returns Locust's exit code; ``brief``: without telling results.

    Ctrl-C and SIGTERM end the run early, with a report of what there is.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _watch(words, settings, brief)
    finally:
        signal.signal(signal.SIGTERM, before)


def _watch(words: list[str], settings: Settings, brief: bool) -> int:
    console = Console()
    reader, writer = os.pipe()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        # A session of its own: Ctrl-C comes here alone, and is passed on to the one process that ends the others.
        child = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[writer], start_new_session=True,
            env={**os.environ, VIEW_FD: str(writer), "GRPC_VERBOSITY": "ERROR"},
        )  # fmt: skip
        os.close(writer)
        try:
            with open(reader, encoding="utf-8") as states:
                interrupted = _follow(states, settings, console, child)
            code = child.wait()
        finally:
            if child.poll() is None:
                _end(child)
        log.seek(0)
        return _tell(log.read(), code, interrupted, None if brief else console)


def _follow(states: Any, settings: Settings, console: Console, child: subprocess.Popen[bytes]) -> bool:
    """Shows every state until the pipe's end; whether Ctrl-C was pressed."""
    view = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
    interrupted = False
    with view or contextlib.nullcontext():
        while True:
            try:
                for line in states:
                    state = json.loads(line)
                    if view is not None:
                        view.update(render(state, settings), refresh=True)
                    elif round(state["now"]) % PLAIN_EVERY_S == 0:
                        console.print(plain_line(state), highlight=False, soft_wrap=True)
                return interrupted
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                child.terminate()  # not SIGINT, which a command in a shell's background has it ignore


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _tell(log: str, code: int, interrupted: bool, console: Console | None) -> int:
    found = _REPORT.search(log)
    if found is None:
        errors = [line.strip() for line in _ERROR.findall(log)] or [log[-2000:].strip()]
        print(f"flashserve: {errors[-1]}", file=sys.stderr)
        return INTERRUPTED if interrupted else code or FAILED
    if console is None:
        return INTERRUPTED if interrupted else code
    page = Path(found[1].strip())
    summary = json.loads((page.parent / "report.json").read_text(encoding="utf-8"))
    console.print(summary_table(summary))
    for line in summary["warnings"]:
        console.print(line, style="yellow", highlight=False, soft_wrap=True)
    for line in summary["objectives_missed"]:
        console.print(f"objective missed: {line}", style="red", highlight=False)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)
    return INTERRUPTED if interrupted else code


# --- on the screen -----------------------------------------------------------------------------------------


def time_words(seconds: float | None) -> str:
    """Seconds, or milliseconds below one."""
    if seconds is None or seconds != seconds:
        return "-"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _last_seconds(statistics: Statistics, now: float, window: int = 5) -> Statistics:
    """What happened in the last whole seconds."""
    last = int(now) - 1
    return Statistics(seconds={at: second for at, second in statistics.seconds.items() if last - window < at <= last})


def _rates(recent: Statistics) -> dict[str, float]:
    count = max(1, len(recent.seconds))
    names = ("planned", "finished", "failed", "tokens")
    return {name: sum(second.counts[name] for second in recent.seconds.values()) / count for name in names}


def render(state: dict[str, Any], settings: Settings) -> Group:
    """The view of one second."""
    statistics = Statistics.from_json(state["statistics"])
    schedule, now = settings.schedule, max(0.0, state["now"])
    counts, rates = statistics.whole.counts, _rates(_last_seconds(statistics, now))
    phase = schedule.phase(now) if now < schedule.end_s else "waiting for late answers"
    title = f"{settings.model}, {now:.0f} of {schedule.end_s:.0f} s, {phase}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "p50", "p90", "p99", "values"):
        table.add_column(name, justify="left" if not name else "right")
    for name, words in (("ttft", "first token"), ("itl", "gap between tokens"), ("e2e", "whole request")):
        histogram = statistics.whole.measures[name]
        table.add_row(words, *(time_words(histogram.quantile(q)) for q in (0.5, 0.9, 0.99)), f"{histogram.count:,}")
    failed = f"[red]{counts['failed']:,} failed[/red]" if counts["failed"] else "none failed"
    lines = [
        f"{counts['finished']:,} answered, {failed}, {state['active']:,} on their way",
        f"{rates['planned']:.1f} requests/s, {rates['tokens']:,.0f} tokens/s in the last seconds",
    ]
    for server in state["server"]:
        running, waiting, kv_usage = (server.get(name, 0.0) for name in ("running", "waiting", "kv_usage"))
        lines.append(f"server: {running:.0f} run, {waiting:.0f} wait, KV {kv_usage:.0%}")
    return Group(table, *lines)


def plain_line(state: dict[str, Any]) -> str:
    """The same in a line, for a log."""
    statistics = Statistics.from_json(state["statistics"])
    counts, measures = statistics.whole.counts, statistics.whole.measures
    rates = _rates(_last_seconds(statistics, state["now"]))
    return (
        f"{state['now']:4.0f} s: {counts['finished']:,} answered, {counts['failed']:,} failed, "
        f"{state['active']:,} on their way, first token p99 {time_words(measures['ttft'].quantile(0.99))}, "
        f"gap p99 {time_words(measures['itl'].quantile(0.99))}, {rates['tokens']:,.0f} tokens/s"
    )


def summary_table(summary: dict[str, Any]) -> Table:
    """A run's steady state, after its end."""
    steady = summary["phases"]["steady"]["measures"]
    table = Table(title=f"steady state, {summary['steady_s']:.0f} s", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("", "p50", "p90", "p99", "values"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (("ttft", "first token"), ("itl", "gap between tokens"), ("tpot", "time per token"), ("e2e", "request"))
    for name, words in rows:
        found = steady[name]
        table.add_row(words, *(time_words(found[q]) for q in ("p50", "p90", "p99")), f"{found['count']:,}")
    table.add_section()
    for name, value in summary["rates"].items():
        table.add_row(name, "-" if value is None else f"{value:,.1f}")
    table.add_row("failed", f"{summary['error_rate']:.2%}")
    return table
