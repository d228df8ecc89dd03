"""The page: one file, with its pictures inside, light or dark as the reader's system is."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from ..statistics import MEASURES
from .figures import Picture
from .summary import TOKEN_MEASURES

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2328; --faint: #d8dce1; --soft: #5b6470; --good: #1a7f37;
  --bad: #b42318; --tint: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --paper: #16191d; --ink: #e3e6ea; --faint: #353b43; --soft: #9aa3af;
  --good: #4cc26a; --bad: #ff8a7a; --tint: #1e2227; } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 62rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { border-bottom: 1px solid var(--faint); padding: .3rem .55rem .3rem 0; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 500; }
td.words { white-space: normal; text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin-top: 1.2rem; }
.figure { background: var(--tint); border-radius: 6px; padding: .6rem 1rem; } .figure b { font-size: 1.3rem;
  display: block; font-weight: 600; }
img { max-width: 100%; min-width: 46rem; height: auto; }
ul { padding-left: 1.2rem; } dt { font-weight: 600; margin-top: .6rem; }
dd { margin: 0; } @media (max-width: 40rem) { td:first-child { white-space: normal; min-width: 6rem; } }
"""
_COLUMNS = ("count", "mean", "p50", "p90", "p95", "p99", "p99.9", "min", "max")


def render_page(summary: dict[str, Any], pictures: list[Picture]) -> str:
    """HTML that needs no other file."""
    options = summary["options"]
    parts = [
        f"<h1>Load test of {escape(str(options['--model']))}</h1>",
        f'<p class="soft">{escape(summary["began"])}, {escape(str(options["loop"]))}, '
        f"{escape('; '.join(options['targets']))}</p>",
        _verdict(summary),
        _headline(summary),
        *(_picture(picture) for picture in pictures),
        "<h2>Steady state</h2>",
        _measures(summary["phases"]["steady"]),
        _protocols(summary),
        "<h2>Requests</h2>",
        _counts(summary),
        _errors(summary),
        "<h2>The server's counters during the run</h2>" if summary["server"] else "",
        _pairs({name: _number(value) for name, value in summary["server"].items()}),
        "<h2>Options</h2>",
        _pairs({name: _option(value) for name, value in options.items()}),
        "<h2>Definitions</h2><dl>",
        *(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in summary["definitions"].items()),
        "</dl>",
    ]
    title = f"Load test of {escape(str(options['--model']))}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n"
    )


def _verdict(summary: dict[str, Any]) -> str:
    lines = [f'<li class="bad">Objective missed: {escape(text)}</li>' for text in summary["objectives_missed"]]
    if summary["has_objectives"] and not lines:
        lines.append('<li class="good">All objectives are met.</li>')
    lines += [f"<li>{escape(text)}</li>" for text in summary["warnings"]]
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _headline(summary: dict[str, Any]) -> str:
    measures = summary["phases"]["steady"]["measures"]
    figures = {
        "TTFT p50": time_text(measures["ttft"]["p50"]),
        "TTFT p99": time_text(measures["ttft"]["p99"]),
        "ITL p50": time_text(measures["itl"]["p50"]),
        "ITL p99": time_text(measures["itl"]["p99"]),
        "failed": f"{summary['error_rate']:.2%}",
        **{name: _number(value) for name, value in summary["rates"].items()},
    }
    boxes = (f'<div class="figure"><b>{escape(value)}</b>{escape(name)}</div>' for name, value in figures.items())
    return f'<div class="figures">{"".join(boxes)}</div>'


def _picture(picture: Picture) -> str:
    data = {theme: base64.b64encode(path.read_bytes()).decode() for theme, path in picture.files.items()}
    title = escape(picture.title)
    return (
        f'<h2>{title}</h2><div class="wide"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{data["dark"]}">'
        f'<img alt="{title}" src="data:image/png;base64,{data["light"]}"></picture></div>'
    )


def _table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _measures(phase: dict[str, Any]) -> str:
    rows = []
    for name, words in MEASURES.items():
        found = phase["measures"][name]
        form = _number if name in TOKEN_MEASURES else time_text
        rows.append([words, f"{found['count']:,}", *(form(found[column]) for column in _COLUMNS[1:])])
    return _table(("", *_COLUMNS), rows)


def _protocols(summary: dict[str, Any]) -> str:
    if len(summary["protocols"]) < 2:
        return ""
    rows = [
        [
            name,
            *(f"{phase['counts'].get(count, 0):,}" for count in ("requests", "failed")),
            *(time_text(phase["measures"][measure][column]) for measure, column in _PROTOCOL_COLUMNS),
        ]
        for name, phase in summary["protocols"].items()
    ]
    head = ("", "requests", "failed", *(f"{measure.upper()} {column}" for measure, column in _PROTOCOL_COLUMNS))
    return "<h2>By protocol</h2>" + _table(head, rows)


_PROTOCOL_COLUMNS = (("ttft", "p50"), ("ttft", "p99"), ("itl", "p50"), ("itl", "p99"), ("e2e", "p50"))
_COUNTED = ("requests", "finished", "left", "failed", "good", "prompt_tokens", "output_tokens")


def _counts(summary: dict[str, Any]) -> str:
    phases = {**summary["phases"], "all": summary["whole"]}
    rows = [[name, *(f"{phase['counts'].get(count, 0):,}" for count in _COUNTED)] for name, phase in phases.items()]
    head = ("planned in", "requests", "answered", "left as planned", "failed", "good", "prompt tokens", "output tokens")
    return _table(head, rows)


def _errors(summary: dict[str, Any]) -> str:
    if not summary["errors"]:
        return ""
    return "<h2>Errors</h2>" + _pairs({text: f"{count:,}" for text, count in summary["errors"].items()})


def _pairs(values: dict[str, str]) -> str:
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="words">{escape(value)}</td></tr>' for name, value in values.items()
    )
    return f"<table>{rows}</table>" if rows else ""


def time_text(seconds: float | None) -> str:
    """Three digits, in the unit that fits."""
    if seconds is None:
        return "-"
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:,.0f} s"
    milliseconds = seconds * 1000
    return f"{milliseconds:.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"


def _option(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:,.3g}"
