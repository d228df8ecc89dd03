"""`flashserve bench --search`: one run per rate, each with its report, and a table of them all."""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .interface import MISSED
from .invocation import locust_words
from .live import time_words, watch_run
from .search import Trial, best_of, find_rate
from .settings import settings_from

# Runs that nobody can hold need not be waited for: what has not begun by then is in TTFT with what it waited.
DRAIN_S = 5.0


class Failed(Exception):
    """A run that made no report, or that Ctrl-C ended; holds the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def run_search(args: argparse.Namespace, urls: list[str]) -> int:
    """Returns 0 if a rate was held, 3 if not even the lowest was."""
    console = Console()
    folder = Path(args.report or Path("loadtest-reports", time.strftime("search-%Y-%m-%d-%H%M%S")))

    def run(rate: float) -> Trial:
        console.print(f"{rate:.4g} requests/s:", style="bold", highlight=False)
        words = copy.copy(args)
        words.rate, words.report = repr(rate), str(folder / f"rate-{rate:.4g}")
        words.drain = min(args.drain, DRAIN_S)
        code = watch_run(locust_words(words, urls), settings_from(words, urls), brief=True)
        if code not in (0, MISSED):
            raise Failed(code)
        report = json.loads(Path(words.report, "report.json").read_text(encoding="utf-8"))
        trial = Trial(rate, tuple(report["objectives_missed"]), report)
        console.print(
            f"  {'; '.join(trial.missed) or 'held'}", style="red" if trial.missed else "green", highlight=False
        )
        return trial

    try:
        trials = find_rate(run, *args.search)
    except Failed as failed:
        return failed.code
    console.print(trials_table(trials))
    best = best_of(trials)
    lines = [{"rate": trial.rate, "missed": trial.missed, "rates": trial.report["rates"]} for trial in trials]
    (folder / "search.json").write_text(json.dumps({"highest_rate": best, "trials": lines}, indent=1), encoding="utf-8")
    if best is None:
        console.print(f"not even {trials[0].rate:g} requests/s are held: search lower", style="red", highlight=False)
        return MISSED
    beyond = min((trial.rate for trial in trials if trial.missed), default=None)
    ending = "the search went no higher" if beyond is None else f"{beyond:.4g} is too much"
    console.print(
        f"highest rate within the objectives: {best:.4g} requests/s ({ending})", style="bold", highlight=False
    )
    console.print(f"reports: {folder}", highlight=False, soft_wrap=True)
    return 0


def trials_table(trials: list[Trial]) -> Table:
    """By rate."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("requests/s", "answered/s", "tokens/s", "first token p99", "gap p99", "failed", ""):
        table.add_column(name, justify="right" if name else "left")
    for trial in sorted(trials, key=lambda trial: trial.rate):
        rates, measures = trial.report["rates"], trial.report["phases"]["steady"]["measures"]
        table.add_row(
            f"{trial.rate:.4g}",
            *(
                "-" if rates[name] is None else f"{rates[name]:.4g}"
                for name in ("answered requests/s", "output tokens/s")
            ),
            *(time_words(measures[name]["p99"]) for name in ("ttft", "itl")),
            f"{trial.report['error_rate']:.1%}",
            "[red]missed[/red]" if trial.missed else "[green]held[/green]",
        )
    return table
