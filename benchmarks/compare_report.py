"""What compare.py found: as a table, as JSON, as a plot."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compare_machine import Ceilings, ModelCost
from compare_measure import Cell, Record, Streaming, agreement

OURS, OURS_INT8 = "flashserve", "flashserve-int8"


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        return cls(statistics.median(values), min(values), max(values)) if values else None

    def text(self, digits: int = 0, scale: float = 1.0) -> str:
        low, median, high = (f"{value * scale:.{digits}f}" for value in (self.low, self.median, self.high))
        return f"{median} ({low}-{high})"


@dataclass(frozen=True)
class Comparison:
    """flashserve against the fastest peer in one cell; above 1 is faster."""

    cell: Cell
    peer: str
    speedup: Spread
    """Of each round's pair."""


@dataclass(frozen=True)
class Target:
    """One of the project's goals, and what was measured."""

    text: str
    value: float
    goal: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def line(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"  {'met   ' if self.met else 'MISSED'}  {self.value:8.2f} {sign} {self.goal:<5g} {self.text}"


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    shape: str
    date: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    cost: ModelCost
    ceilings: list[Ceilings]
    cells: tuple[Cell, ...]
    records: dict[str, Record]
    served: dict[str, Record]
    served_cell: Cell | None

    @property
    def best_ceilings(self) -> Ceilings:
        """The medians over the rounds."""
        return Ceilings(
            statistics.median(each.read_gb_s for each in self.ceilings),
            statistics.median(each.gemm_tflop_s for each in self.ceilings),
        )

    def comparison(self, cell: Cell) -> Comparison | None:
        """None where flashserve or all peers have no figure."""
        mine = self.records[OURS].values(cell) if OURS in self.records else []
        peers = {
            name: values
            for name, record in self.records.items()
            if not record.engine.ours and (values := record.values(cell))
        }
        if not mine or not peers:
            return None
        best = (min if cell.is_ttft else max)(peers, key=lambda name: statistics.median(peers[name]))
        pairs = zip(mine, peers[best], strict=False)
        speedup = Spread.of([theirs / ours if cell.is_ttft else ours / theirs for ours, theirs in pairs])
        assert speedup is not None
        return Comparison(cell, best, speedup)

    def floor(self, cell: Cell) -> float:
        """Tokens per second, or seconds to the first token, at the measured ceilings."""
        if cell.is_ttft:
            return self.cost.prefill_s(cell.requests, cell.prompt, self.best_ceilings)
        return self.cost.tokens_per_s(cell.requests, cell.prompt, cell.output, self.best_ceilings)

    def streaming(self, name: str) -> Streaming | None:
        record = self.served.get(name)
        return Streaming.of(record, self.served_cell) if record is not None and self.served_cell is not None else None


def targets(found: Findings) -> list[Target]:
    """The goals that this run can judge."""
    goals = [target for cell in found.cells if (target := _offline_target(found, cell)) is not None]
    if OURS in found.records and OURS_INT8 in found.records:
        for cell in found.cells:
            pairs = zip(found.records[OURS_INT8].values(cell), found.records[OURS].values(cell), strict=False)
            ratio = Spread.of([int8 / bf16 for int8, bf16 in pairs])
            if cell.requests == 16 and ratio is not None:
                goals.append(Target(f"x flashserve bf16: int8, {cell.key}", ratio.median, 1.4))
    return goals + _served_targets(found)


def _offline_target(found: Findings, cell: Cell) -> Target | None:
    comparison = found.comparison(cell)
    if comparison is None:
        return None
    peer = found.records[comparison.peer].engine.title
    speedup = comparison.speedup.median
    if cell.is_ttft:
        return Target(f"x {peer}: time to first token of {cell.prompt} tokens", 1 / speedup, 0.9, at_least=False)
    if not found.shape.startswith("tinyllama"):
        return Target(f"x {peer}: {cell.key}", speedup, 1.4)
    if cell.requests == 1:
        # Where the best peer is at the bandwidth's limit already, nobody can be much faster.
        limit = found.cost.bandwidth_tokens_per_s(cell.prompt + cell.output // 2, found.best_ceilings)
        share = statistics.median(found.records[OURS].values(cell)) / limit
        if share / 0.87 > speedup / 1.15:
            return Target(f"x what reading all weights allows ({limit:.1f} tok/s): {cell.key}", share, 0.87)
    return Target(f"x {peer}: {cell.key}", speedup, 1.15)


def _served_targets(found: Findings) -> list[Target]:
    goals = []
    ours, theirs = found.streaming("flashserve-served"), found.streaming("vllm-served")
    if ours is not None and found.served_cell is not None and OURS in found.served:
        offline = found.served[OURS].values(found.served_cell)
        ratio = statistics.median(a / b for a, b in zip(ours.tokens_per_s, offline, strict=False))
        goals += [
            Target("x offline: served tokens/s", ratio, 0.85),
            Target("tokens per response, median", ours.tokens_per_response_p50, 2, at_least=False),
            Target(
                "tokens in a first response, median: merging delays none",
                ours.tokens_in_first_response_p50,
                1,
                at_least=False,
            ),
            Target("x median: 99th percentile of the gap", ours.gap_p99_ms / ours.gap_p50_ms, 3, at_least=False),
        ]
    if ours is not None and theirs is not None:
        ratio = statistics.median(a / b for a, b in zip(ours.tokens_per_s, theirs.tokens_per_s, strict=False))
        goals.append(Target("x vLLM-CPU's server: served tokens/s", ratio, 2))
    if "flashserve-served" in found.served and (starts := found.served["flashserve-served"].first_token_s):
        goal = 10 if found.shape.startswith("tinyllama") else 6
        goals.append(Target("s from the server's start to the first token, last start", starts[-1], goal, False))
    return goals


def table(found: Findings) -> str:
    """The whole report as text."""
    best = found.best_ceilings
    machine = found.machine
    lines = [
        "",
        f"{found.shape}, bfloat16, greedy, no prefix caching, {len(found.ceilings)} rounds; medians (lowest-highest)",
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['flags'])}), {machine['memory_gib']} GiB",
        f"ceilings: {Spread.of([each.read_gb_s for each in found.ceilings]).text(1)} GB/s read, "  # type: ignore[union-attr]
        f"{Spread.of([each.gemm_tflop_s for each in found.ceilings]).text(2)} TFLOP/s bf16",  # type: ignore[union-attr]
        "",
    ]
    throughput = [cell for cell in found.cells if not cell.is_ttft]
    ttft = [cell for cell in found.cells if cell.is_ttft]
    heads = [f"{cell.prompt} in, {cell.output} out x {cell.requests}" for cell in throughput]
    heads += [f"first of {cell.prompt}, ms" for cell in ttft]
    rows = [["output tokens/s", *heads]]
    rows += [
        [record.engine.title, *(_figure(record, cell) for cell in (*throughput, *ttft))]
        for record in found.records.values()
    ]
    floors = [f"{found.floor(cell) * (1000 if cell.is_ttft else 1):.0f}" for cell in (*throughput, *ttft)]
    rows.append([f"floor at {best.read_gb_s:.0f} GB/s, {best.gemm_tflop_s:.2f} TFLOP/s", *floors])
    comparisons = [found.comparison(cell) for cell in (*throughput, *ttft)]
    rows.append(["best peer", *(found.records[c.peer].engine.title if c else "-" for c in comparisons)])
    rows.append(["flashserve / best peer", *(c.speedup.text(2) if c else "-" for c in comparisons)])
    lines += _aligned(rows)
    lines += _served_lines(found)
    lines += _notes(found)
    goals = targets(found)
    if goals:
        lines += ["", "goals", *(goal.line() for goal in goals)]
    return "\n".join(lines)


def _figure(record: Record, cell: Cell) -> str:
    spread = Spread.of(record.values(cell))
    if spread is None:
        return "failed" if record.failures else "-"
    text = spread.text(0, 1000) if cell.is_ttft else spread.text(1 if spread.median < 100 else 0)
    return text + (" *" if _is_capped(record, cell) else "")


def _is_capped(record: Record, cell: Cell) -> bool:
    return record.engine.most_requests is not None and record.engine.most_requests < cell.requests


def _served_lines(found: Findings) -> list[str]:
    if found.served_cell is None:
        return []
    rows = [["served", "tok/s", "TTFT p50 ms", "gap p50 ms", "gap p99 ms", "tokens/response", "start to 1st token s"]]
    for name, record in found.served.items():
        streaming = found.streaming(name)
        starts = ", ".join(f"{seconds:.1f}" for seconds in record.first_token_s)
        spread = Spread.of(record.values(found.served_cell))
        row = [record.engine.title, spread.text() if spread else "failed"]
        if streaming is not None:
            times = (streaming.ttft_p50_ms, streaming.gap_p50_ms, streaming.gap_p99_ms)
            row += [*(f"{value:.1f}" for value in times), f"{streaming.tokens_per_response_p50:g}", starts]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    users = f"{found.served_cell.requests} requests, {found.settings['users']} users, client on the same cores:"
    return ["", users, *_aligned(rows)]


def _notes(found: Findings) -> list[str]:
    """Failures, settings and versions of every engine."""
    lines = ["", "engines"]
    reference = found.records.get("transformers-static")
    for record in (*found.records.values(), *(r for n, r in found.served.items() if n not in found.records)):
        versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        lines.append(f"  {record.engine.title}: {versions}")
        lines += [f"      {name}={value}" for name, value in record.settings.items()]
        if record.load_s:
            lines.append(f"      loaded in {', '.join(f'{seconds:.1f}' for seconds in record.load_s)} s")
        if reference is not None and (equal := agreement(record, reference, found.cells)) is not None:
            lines.append(f"      first token equal to transformers' bf16: {equal:.0%}")
        if any(_is_capped(record, cell) for cell in found.cells):
            lines.append(f"      * with {record.engine.most_requests} requests: more would only take longer")
        lines += [f"      {what}: FAILED: {reason}" for what, reason in record.failures.items()]
        lines += [f"      {remark}" for remark in record.remarks]
    return lines


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (text.ljust(widths[0]) if i == 0 else text.rjust(widths[i]) for i, text in enumerate(row))
        lines.append("  ".join([first, *others]))
    return lines


def as_json(found: Findings) -> dict[str, Any]:
    """All of it, each round's figures included."""
    return {
        "shape": found.shape,
        "date": found.date,
        "machine": found.machine,
        "settings": found.settings,
        "model_cost": asdict(found.cost),
        "ceilings": [asdict(each) for each in found.ceilings],
        "engines": {
            name: {
                "versions": record.versions,
                "settings": record.settings,
                "load_s": record.load_s,
                "first_token_s": record.first_token_s,
                "failures": record.failures,
                "remarks": record.remarks,
            }
            for name, record in (found.served | found.records).items()
        },
        "cells": [_cell_json(found, cell) for cell in found.cells],
        "served": {
            name: {
                "tokens_per_s": record.values(found.served_cell),
                **(asdict(s) if (s := found.streaming(name)) else {}),
            }
            for name, record in found.served.items()
            if found.served_cell is not None
        },
        "goals": [{**asdict(goal), "met": goal.met} for goal in targets(found)],
    }


def _cell_json(found: Findings, cell: Cell) -> dict[str, Any]:
    comparison = found.comparison(cell)
    return {
        **asdict(cell),
        "unit": "s to first token" if cell.is_ttft else "output tokens/s",
        "floor": found.floor(cell),
        "rounds": {name: record.values(cell) for name, record in found.records.items()},
        "median": {
            name: statistics.median(values) for name, record in found.records.items() if (values := record.values(cell))
        },
        "best_peer": comparison and comparison.peer,
        "speedup": comparison and asdict(comparison.speedup),
    }


def write(found: Findings, out: Path) -> list[Path]:
    """JSON and, if matplotlib is there, a plot, under a folder named after the CPU."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\([^)]*\)", "", found.machine["cpu"].lower())).strip("-")
    folder = out / f"{slug}-{found.machine['cores']}-cores"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found.date}-{found.shape}.json"
    path.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
    return [path, *plot(found, path.with_suffix(".png"))]


def plot(found: Findings, path: Path) -> list[Path]:
    """Bars of tokens per second, one group for each number of requests, and the floors above them."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install 'flashserve[bench]')")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = [cell for cell in found.cells if not cell.is_ttft]
    records = [record for record in found.records.values() if any(record.values(cell) for cell in cells)]
    figure, axes = pyplot.subplots(figsize=(2.5 + 2.8 * len(cells), 4.8), layout="constrained")
    width = 0.8 / max(1, len(records))
    colors = pyplot.get_cmap("tab10").colors
    for index, record in enumerate(records):
        spreads = [(group, Spread.of(record.values(cell))) for group, cell in enumerate(cells)]
        drawn = [(group - 0.4 + (index + 0.5) * width, spread) for group, spread in spreads if spread is not None]
        bars = axes.bar(
            [x for x, _ in drawn],
            [spread.median for _, spread in drawn],
            width * 0.92,
            yerr=[[s.median - s.low for _, s in drawn], [s.high - s.median for _, s in drawn]],
            label=record.engine.title,
            color=colors[index % len(colors)],
            error_kw={"linewidth": 0.8},
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    for group, cell in enumerate(cells):
        floor = found.floor(cell)
        axes.hlines(floor, group - 0.42, group + 0.42, colors="black", linestyles="dashed", linewidth=1)
        axes.text(group + 0.42, floor, f"floor {floor:.0f}", fontsize=7, ha="right", va="bottom")
    axes.set_xticks(range(len(cells)), [f"{c.requests} x ({c.prompt} in, {c.output} out)" for c in cells])
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{found.shape}, bf16, {found.machine['cores']} cores of {found.machine['cpu']}", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(fontsize=7, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return [path]
