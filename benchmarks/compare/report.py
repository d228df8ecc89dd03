"""What was found: as a table, as JSON, as a plot."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.machine import Ceilings
from benchmarks.common.plots import COLORS, Theme, draw
from benchmarks.common.results import Spread, cpu_result, write_json
from benchmarks.common.shapes import ModelCost
from benchmarks.common.tables import aligned
from benchmarks.compare.measure import Cell, Record, Streaming, agreement

OURS = "flashserve"


@dataclass(frozen=True)
class Comparison:
    """flashserve against the fastest peer in one cell; above 1 is faster."""

    cell: Cell
    peer: str
    speedup: Spread
    """Of each round's pair."""


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
            return self.cost.prefill_floor_s(cell.requests, cell.prompt, *self.best_ceilings.rates)
        return self.cost.tokens_per_s(cell.requests, cell.prompt, cell.output, *self.best_ceilings.rates)

    def streaming(self, name: str) -> Streaming | None:
        record = self.served.get(name)
        return Streaming.of(record, self.served_cell) if record is not None and self.served_cell is not None else None


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
    lines += aligned(rows)
    lines += _served_lines(found)
    lines += _notes(found)
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
    return ["", users, *aligned(rows)]


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
    """JSON and, if matplotlib is there, a picture, under a folder named after the CPU."""
    path = cpu_result(out, found.machine, found.shape)
    write_json(path, as_json(found))
    cells = sum(not cell.is_ttft for cell in found.cells)
    return [
        path,
        *draw(path.with_suffix(""), (2.5 + 2.8 * cells, 4.8), lambda figure, theme: _bars(found, figure, theme)),
    ]


def _bars(found: Findings, figure: Any, theme: Theme) -> None:
    """Tokens per second, one group for each number of requests, and the floors above them."""
    cells = [cell for cell in found.cells if not cell.is_ttft]
    records = [record for record in found.records.values() if any(record.values(cell) for cell in cells)]
    axes = figure.subplots()
    width = 0.8 / max(1, len(records))
    for index, record in enumerate(records):
        spreads = [(group, Spread.of(record.values(cell))) for group, cell in enumerate(cells)]
        drawn = [(group - 0.4 + (index + 0.5) * width, spread) for group, spread in spreads if spread is not None]
        bars = axes.bar(
            [x for x, _ in drawn],
            [spread.median for _, spread in drawn],
            width * 0.92,
            yerr=[[s.median - s.low for _, s in drawn], [s.high - s.median for _, s in drawn]],
            label=record.engine.title,
            color=COLORS[index % len(COLORS)],
            error_kw={"linewidth": 0.8, "ecolor": theme.text},
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=7, padding=2)
    for group, cell in enumerate(cells):
        floor = found.floor(cell)
        axes.hlines(floor, group - 0.42, group + 0.42, colors=theme.text, linestyles="dashed", linewidth=1)
        axes.text(group + 0.42, floor, f"floor {floor:.0f}", fontsize=7, ha="right", va="bottom")
    axes.set_xticks(range(len(cells)), [f"{c.requests} x ({c.prompt} in, {c.output} out)" for c in cells])
    axes.set_ylabel("output tokens/s")
    axes.set_title(f"{found.shape}, bf16, {found.machine['cores']} cores of {found.machine['cpu']}", fontsize=10)
    axes.margins(y=0.12)
    axes.legend(fontsize=7, loc="upper left")
