"""The pictures: where static batches wait, what batching gains, and throughput against latency."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.batching.grid import Grid
from benchmarks.batching.load import Mixed, Point
from benchmarks.batching.workload import OURS, SERVED, SYSTEMS
from benchmarks.common.engines import CONTINUOUS, ENGINES, NAIVE, STATIC
from benchmarks.common.plots import COLORS, Theme, draw, head

COLOR = {SERVED: COLORS[0], CONTINUOUS: COLORS[1], STATIC: COLORS[2], NAIVE: COLORS[6], OURS: COLORS[4]}
MARKER = dict(zip(SYSTEMS, ("s", "^", "v", "o", "D"), strict=True))


def draw_all(path: Path, subtitle: str, grid: Grid, mixed: Mixed | None, points: Sequence[Point]) -> list[Path]:
    """Each of them that has something to show, as ``<path>-<what>-<theme>.png``."""
    files: list[Path] = []
    if mixed is not None:
        files += draw(path.with_name(f"{path.name}-slots"), (9, 5.6), partial(_slots, mixed, subtitle))
    if grid.rates:
        files += draw(path.with_name(f"{path.name}-speedup"), (9, 3.6), partial(_speedup, grid, subtitle))
    if points:
        files += draw(path.with_name(f"{path.name}-latency"), (7.5, 4.8), partial(_latency, points, subtitle))
    return files


def _slots(mixed: Mixed, subtitle: str, figure: Any, theme: Theme) -> None:
    """Steps to the right, a row for each place in the batch, a bar for each request."""
    panels = {
        STATIC: "Static batches: all places wait for the longest request",
        OURS: "Continuous batching (flashserve): the next request takes a free place at once",
    }
    axes = figure.subplots(2, 1, sharex=True)
    end = max(max(mixed.systems[name]["steps"]["last"]) for name in panels)
    for ax, (name, title) in zip(axes, panels.items(), strict=True):
        steps = mixed.systems[name]["steps"]
        _bars(ax, steps, mixed.work.outputs if name == STATIC else None, theme)
        total = max(steps["last"])
        ax.axvline(total, color=theme.text, linewidth=1, linestyle="dashed")
        ax.text(total + end * 0.008, mixed.batch - 0.9, f"done after\n{total} steps", fontsize=9, va="top")
        ax.set_title(f"{title}; {mixed.systems[name]['busy']:.0%} busy", loc="left", fontsize=10)
        ax.set_ylabel("places in the batch")
        ax.set_yticks(range(mixed.batch), [str(i + 1) for i in range(mixed.batch)], fontsize=7)
        ax.set_xlim(0, end * 1.12)
    axes[1].set_xlabel("steps of the model")
    axes[1].legend(loc="lower right", fontsize=9, frameon=False)
    text = f"{len(mixed.work)} requests of {min(mixed.work.outputs)} to {max(mixed.work.outputs)} tokens"
    head(figure, f"The same {text} in {mixed.batch} places", subtitle, theme)


def _bars(ax: Any, steps: dict[str, list[int]], outputs: Sequence[int] | None, theme: Theme) -> None:
    """outputs: the steps of each bar that gave its request a token; None: all."""
    before = [0] * len(steps["slots"])
    style = {"height": 0.82, "edgecolor": theme.background}
    for i, (first, last, slot) in enumerate(zip(steps["first"], steps["last"], steps["slots"], strict=True)):
        useful = last - first if outputs is None else min(outputs[i], last - first)
        before[slot] += 1
        ax.barh(slot, useful, left=first, color=COLORS[(5, 1)[before[slot] % 2]], linewidth=1.2, **style)
        if last - first > useful:
            waste = {"color": theme.faint, "alpha": 0.8, "hatch": "////", "linewidth": 0}
            ax.barh(slot, last - first - useful, left=first + useful, **waste, **style)
    ax.bar(0, 0, color=COLORS[1], label="a request's tokens; the next request's in a lighter shade")
    ax.bar(0, 0, color=theme.faint, alpha=0.8, hatch="////", edgecolor=theme.background, label="computed for nobody")


def _speedup(grid: Grid, subtitle: str, figure: Any, theme: Theme) -> None:
    """flashserve through Triton over one request at a time: requests upwards, batch to the right."""
    panels = figure.subplots(1, len(grid.outputs), sharey=True, squeeze=False)[0]
    tables = [
        [[grid.speedup(SERVED, requests, batch, output) for batch in grid.batches] for requests in grid.requests]
        for output in grid.outputs
    ]
    most = max(max(map(max, table)) for table in tables)
    for ax, output, table in zip(panels, grid.outputs, tables, strict=True):
        ax.imshow(table, cmap="YlOrRd", vmin=0, vmax=most, aspect="auto", origin="lower")
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                text = f"{value:.0f}×" if value >= 9.95 else f"{value:.1f}×"
                color = "#1f2328" if value < 0.6 * most else "#ffffff"
                ax.text(x, y, text, ha="center", va="center", fontsize=9, color=color)
        ax.set_xticks(range(len(grid.batches)), grid.batches)
        ax.set_yticks(range(len(grid.requests)), grid.requests)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set_title(f"{output} tokens out", fontsize=10)
        ax.set_xlabel("batch")
    panels[0].set_ylabel("requests")
    head(figure, "flashserve through Triton: times the throughput of one by one (transformers)", subtitle, theme)


def _latency(points: Sequence[Point], subtitle: str, figure: Any, theme: Theme) -> None:
    """Each line is a system under more and more load; it ends where requests queue for as long as they come."""
    axes = figure.subplots()
    for name in SYSTEMS:
        own = [point for point in points if point.system == name]
        if not own:
            continue
        rates = [point.tokens_per_s for point in own]
        times = [point.latency["normalised_p50_ms"] for point in own]
        width = 2.4 if ENGINES[name].ours else 1.6
        axes.plot(
            rates,
            times,
            color=COLOR[name],
            linewidth=width,
            marker=MARKER[name],
            markersize=5,
            label=ENGINES[name].title,
        )
        if not own[-1].keeps_up:
            axes.plot(rates[-1], times[-1], marker="x", markersize=11, color=theme.text, linestyle="none")
    axes.plot([], [], marker="x", markersize=9, color=theme.text, linestyle="none", label="too much: the queue grows")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("output tokens per second, all users (more is better)")
    axes.set_ylabel("ms per output token, median request,\nwaiting included (less is better)")
    axes.grid(alpha=0.6)
    axes.legend(fontsize=8, frameon=False)
    head(figure, "Throughput against latency, requests arriving at random", subtitle, theme)
