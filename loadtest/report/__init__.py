"""What remains of a run: a page, its pictures, and the figures as JSON and CSV."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

from ..outcome import Outcome
from .figures import draw_figures
from .page import render_page
from .summary import per_second, summarise

REPORTS = Path("loadtest-reports")


def write_report(outcome: Outcome) -> Path:
    """Writes report.html, its PNGs, report.json and seconds.csv into the run's folder; returns the page's path."""
    folder = outcome.settings.report or REPORTS / time.strftime("%Y-%m-%d-%H%M%S", time.localtime(outcome.began))
    folder.mkdir(parents=True, exist_ok=True)
    summary, rows = summarise(outcome), per_second(outcome)
    (folder / "report.json").write_text(json.dumps({**summary, "seconds": rows}, indent=1), encoding="utf-8")
    with (folder / "seconds.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["second"])
        writer.writeheader()
        writer.writerows(rows)
    pictures = draw_figures(outcome, rows, folder)
    page = folder / "report.html"
    page.write_text(render_page(summary, pictures), encoding="utf-8")
    return page
