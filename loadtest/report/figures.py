"""The pictures, each for a light and for a dark page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from ..histogram import BUCKETS_PER_DOUBLING, Histogram, upper_bound
from ..outcome import Outcome

MAX_POINTS = 100  # beyond that, seconds are drawn together
# Tokens that one read brought have no gap between them; on a logarithmic axis they would be far away from all others.
LEAST_BUCKET = math.floor(math.log2(5e-5) * BUCKETS_PER_DOUBLING)
SIZE = (9.0, 3.2)
DPI = 110


@dataclass(frozen=True)
class Theme:
    name: str
    paper: str
    ink: str
    faint: str
    first: str
    second: str
    third: str


# The same three hues, lighter on dark paper so that each keeps a contrast above 3:1 to it.
THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d8dce1", "#1f6fd1", "#c4530a", "#6b7280"),
    Theme("dark", "#16191d", "#e3e6ea", "#353b43", "#62a4f5", "#f08c4a", "#9aa3af"),
)


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    files: dict[str, Path]
    """By theme."""


def draw_figures(outcome: Outcome, rows: list[dict[str, Any]], folder: Path) -> list[Picture]:
    """Draws what there is data for into ``folder``."""
    drawings: list[tuple[str, str, Any]] = [
        ("distributions", "How long first tokens and gaps take (steady state)", _distributions),
        ("percentiles", "Percentiles over time, of first tokens and gaps that came in each second", _percentiles),
        ("throughput", "Requests and tokens over time", _throughput),
    ]
    if any(row["server_running"] is not None for row in rows):
        drawings.append(("server", "The server's own figures over time", _server))
    step = max(1, -(-len(rows) // MAX_POINTS))
    pictures = []
    for name, title, draw in drawings:
        files = {}
        for theme in THEMES:
            with plt.rc_context(_style(theme)):
                figure, axes = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
                draw(axes, outcome, rows[::step], step, theme)
                files[theme.name] = folder / f"{name}{'' if theme.name == 'light' else '-dark'}.png"
                figure.savefig(files[theme.name], dpi=DPI)
                plt.close(figure)
        pictures.append(Picture(name, title, files))
    return pictures


def _style(theme: Theme) -> dict[str, Any]:
    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor"), theme.ink
    )
    return {
        **colours,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.edgecolor": theme.faint,
        "grid.color": theme.faint,
        "axes.grid": True,
        "grid.linewidth": 0.6,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "lines.linewidth": 1.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.labelcolor": theme.ink,
    }


def _legend(axis: Any) -> None:
    """Beside the title, where it covers no line."""
    axis.legend(ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98), borderaxespad=0, handlelength=1.4)


def _milliseconds(value: float, _: Any = None) -> str:
    return f"{value / 1000:g} s" if value >= 1000 else f"{value:g} ms"


def _time_axis(axis: Any, outcome: Outcome, theme: Theme) -> None:
    """Warm-up, edges and the time of late answers are shaded: they are not in the steady figures."""
    first, last = outcome.settings.schedule.steady
    right = max(axis.get_xlim()[1], outcome.settings.schedule.end_s)
    for start, end in ((0, first), (last, right)):
        axis.axvspan(start, end, color=theme.third, alpha=0.12, linewidth=0)
    axis.set_xlim(0, right)
    axis.set_xlabel("seconds (shaded: not in the steady state)")


def _distributions(axes: Any, outcome: Outcome, rows: Any, step: int, theme: Theme) -> None:
    for axis, name, title, colour in (
        (axes[0], "ttft", "time to first token", theme.first),
        (axes[1], "itl", "gap between tokens", theme.second),
    ):
        histogram: Histogram = outcome.steady.measures[name]
        axis.set_title(title)
        axis.set_xlabel(f"{histogram.count:,} values; below 0.05 ms drawn as that")
        if not histogram.count:
            axis.text(0.5, 0.5, "no values", ha="center", transform=axis.transAxes)
            continue
        # Some forty bars over what is there: of single buckets, those between would be empty.
        least = max(min(histogram.buckets), LEAST_BUCKET)
        together = max(1, (max(histogram.buckets) - least) // 40)
        bars: dict[int, int] = {}
        for index, times in histogram.buckets.items():
            bar = max(index, least) // together
            bars[bar] = bars.get(bar, 0) + times
        lows = [upper_bound(bar * together - 1) * 1000 for bar in bars]
        widths = [upper_bound((bar + 1) * together - 1) * 1000 - low for bar, low in zip(bars, lows, strict=True)]
        shares = [100 * times / histogram.count for times in bars.values()]
        axis.bar(lows, shares, widths, align="edge", color=colour, alpha=0.85, linewidth=0)
        for share, style in ((0.5, "-"), (0.99, "--")):
            found = histogram.quantile(share) * 1000
            label = f"p{share * 100:g} {_milliseconds(float(f'{found:.3g}'))}"
            axis.axvline(found, color=theme.ink, linestyle=style, linewidth=1.1, label=label)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FuncFormatter(_milliseconds))
        low, high = axis.get_xlim()
        if high / low < 200:  # few powers of ten: name steps in between too
            axis.xaxis.set_minor_formatter(
                FuncFormatter(lambda value, _: _milliseconds(value) if f"{value:.0e}"[0] in "25" else "")
            )
        else:
            axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("% of values")
        _legend(axis)


def _merged(outcome: Outcome, row: dict[str, Any], step: int, name: str) -> Histogram:
    merged = Histogram()
    for at in range(row["second"], row["second"] + step):
        if at in outcome.statistics.seconds:
            merged.merge(getattr(outcome.statistics.seconds[at], name))
    return merged


def _percentiles(axes: Any, outcome: Outcome, rows: Any, step: int, theme: Theme) -> None:
    for axis, name, title in ((axes[0], "ttft", "time to first token"), (axes[1], "itl", "gap between tokens")):
        merged = [_merged(outcome, row, step, name) for row in rows]
        times = [row["second"] + step / 2 for row in rows]
        for share, colour in ((0.5, theme.first), (0.9, theme.third), (0.99, theme.second)):
            values = [histogram.quantile(share) * 1000 for histogram in merged]
            axis.plot(times, values, color=colour, label=f"p{share * 100:g}")
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        axis.yaxis.set_major_formatter(FuncFormatter(_milliseconds))
        _legend(axis)
        _time_axis(axis, outcome, theme)


def _throughput(axes: Any, outcome: Outcome, rows: Any, step: int, theme: Theme) -> None:
    def per_s(name: str) -> list[float]:
        seconds = outcome.statistics.seconds
        spans = [range(row["second"], row["second"] + step) for row in rows]
        return [sum(seconds[at].counts[name] for at in span if at in seconds) / step for span in spans]

    times = [row["second"] + step / 2 for row in rows]
    lines = [("planned", theme.third), ("finished", theme.first)]
    if outcome.statistics.whole.counts["failed"]:
        lines.append(("failed", theme.second))
    for name, colour in lines:
        axes[0].plot(times, per_s(name), color=colour, label={"finished": "answered"}.get(name, name))
    axes[0].set_title("requests per second")
    _legend(axes[0])
    axes[1].plot(times, per_s("tokens"), color=theme.first)
    axes[1].set_title("output tokens per second, as they arrived")
    for axis in axes:
        axis.set_ylim(bottom=0)
        _time_axis(axis, outcome, theme)


def _server(axes: Any, outcome: Outcome, rows: Any, step: int, theme: Theme) -> None:
    samples = [sample for sample in outcome.server if sample["at_s"] >= 0]
    times = [sample["at_s"] for sample in samples]
    for name, colour in (("running", theme.first), ("waiting", theme.second)):
        axes[0].plot(times, [sample.get(name, float("nan")) for sample in samples], color=colour, label=name)
    axes[0].set_title("requests in the server")
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes[0])
    axes[1].plot(times, [100 * sample.get("kv_usage", float("nan")) for sample in samples], color=theme.first)
    axes[1].set_title("KV memory in use, %")
    for axis in axes:
        axis.set_ylim(bottom=0)
        _time_axis(axis, outcome, theme)
