"""What was found: as a table, as JSON, as a plot."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common.engines import STATIC
from benchmarks.common.machine import Ceilings
from benchmarks.common.plots import COLORS, Theme, draw
from benchmarks.common.results import Spread, cpu_result, write_json
from benchmarks.common.shapes import ModelCost
from benchmarks.common.tables import markdown
from benchmarks.compare.measure import OURS, Cell, Record, agreement, streaming


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    shape: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    cost: ModelCost
    cells: list[Cell]
    records: dict[str, Record]
    ceilings: list[Ceilings] = field(default_factory=list)
    """One a round."""

    @property
    def offline(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.served]

    @property
    def best_ceilings(self) -> Ceilings:
        """The medians over the rounds."""
        return Ceilings(
            statistics.median(each.read_gb_s for each in self.ceilings),
            statistics.median(each.gemm_tflop_s for each in self.ceilings),
        )

    def best_peer(self, cell: Cell) -> Record | None:
        peers = [record for record in self.records.values() if not record.engine.ours and record.values(cell)]
        best = min if cell.is_ttft else max
        return best(peers, key=lambda record: statistics.median(record.values(cell)), default=None)

    def speedup(self, cell: Cell) -> Spread | None:
        """flashserve against the fastest peer, of each round's pair; above 1 is faster. None without a pair."""
        mine, peer = self.records.get(OURS), self.best_peer(cell)
        if mine is None or peer is None:
            return None
        pairs = zip(mine.values(cell), peer.values(cell), strict=False)
        return Spread.of([theirs / ours if cell.is_ttft else ours / theirs for ours, theirs in pairs])

    def floor(self, cell: Cell) -> float:
        """Tokens per second, or seconds to the first token, at the measured ceilings."""
        if cell.is_ttft:
            return self.cost.prefill_floor_s(cell.requests, cell.prompt, *self.best_ceilings.rates)
        return self.cost.tokens_per_s(cell.requests, cell.prompt, cell.output, *self.best_ceilings.rates)


def table(found: Findings) -> str:
    """The whole report as text."""
    machine, cells = found.machine, found.offline
    heads = [
        f"first of {cell.prompt}, ms" if cell.is_ttft else f"{cell.prompt} in, {cell.output} out x {cell.requests}"
        for cell in cells
    ]
    rows = [["output tokens/s", *heads]]
    offline = [record for record in found.records.values() if not record.engine.served]
    rows += [[record.engine.title, *(_figure(record, cell) for cell in cells)] for record in offline]
    floors = [f"{found.floor(cell) * (1000 if cell.is_ttft else 1):.0f}" for cell in cells]
    rows.append([f"floor at {found.best_ceilings}", *floors])
    rows.append(["best peer", *(peer.engine.title if (peer := found.best_peer(cell)) else "-" for cell in cells)])
    speedups = [found.speedup(cell) for cell in cells]
    rows.append(["flashserve / best peer", *(spread.text(2) if spread else "-" for spread in speedups)])
    lines = [
        "",
        f"{found.shape}, bfloat16, greedy, no prefix caching, {len(found.ceilings)} rounds; medians (lowest-highest)",
        f"{machine['cores']} cores of {machine['cpu']} ({', '.join(machine['flags'])}), {machine['memory_gib']} GiB",
        "",
        *markdown(rows),
    ]
    for cell in found.cells:
        if cell.served:
            lines += _served_lines(found, cell)
    return "\n".join([*lines, *_notes(found)])


def _figure(record: Record, cell: Cell) -> str:
    spread = Spread.of(record.values(cell))
    if spread is None:
        return "failed" if record.failures else "-"
    text = spread.text(0, 1000) if cell.is_ttft else spread.text(1 if spread.median < 100 else 0)
    return text + (" *" if record.is_capped(cell) else "")


def _served_lines(found: Findings, cell: Cell) -> list[str]:
    rows = [["served", "tok/s", "TTFT p50 ms", "gap p50 ms", "gap p99 ms", "tokens/response", "start to 1st token s"]]
    for record in found.records.values():
        if not record.takes(cell):
            continue
        row = [record.engine.title, _figure(record, cell)]
        if seen := streaming(record, cell):
            starts = ", ".join(f"{seconds:.1f}" for seconds in record.started.first_token_s)
            row += [*(f"{value:.1f}" for value in seen.values()), starts]
        rows.append(row + ["-"] * (len(rows[0]) - len(row)))
    return ["", f"{cell.requests} requests, {cell.batch} users, client on the same cores:", "", *markdown(rows)]


def _notes(found: Findings) -> list[str]:
    """Failures, settings and versions of every engine."""
    lines = ["", "engines"]
    reference = found.records.get(STATIC)
    for record in found.records.values():
        started = record.started
        versions = ", ".join(f"{name} {version}" for name, version in started.versions.items())
        lines.append(f"  {record.engine.title}: {versions}")
        lines += [f"      {name}={value}" for name, value in started.settings.items()]
        if started.load_s:
            lines.append(f"      loaded in {', '.join(f'{seconds:.1f}' for seconds in started.load_s)} s")
        if reference is not None and (equal := agreement(record, reference, found.cells)) is not None:
            lines.append(f"      first token equal to transformers' bf16: {equal:.0%}")
        if any(record.is_capped(cell) for cell in found.cells):
            lines.append("      * with fewer requests: more would only take longer")
        lines += [f"      {what}: FAILED: {reason}" for what, reason in record.failures.items()]
    return lines


def as_json(found: Findings) -> dict[str, Any]:
    """All of it, each round's figures included."""
    return {
        "shape": found.shape,
        "machine": found.machine,
        "settings": found.settings,
        "model_cost": asdict(found.cost),
        "ceilings": [asdict(each) for each in found.ceilings],
        "engines": {
            name: {**asdict(record.started), "failures": record.failures} for name, record in found.records.items()
        },
        "cells": [_cell_json(found, cell) for cell in found.cells],
    }


def _cell_json(found: Findings, cell: Cell) -> dict[str, Any]:
    peer, speedup = found.best_peer(cell), found.speedup(cell)
    return {
        **asdict(cell),
        "unit": "s to first token" if cell.is_ttft else "output tokens/s",
        "floor": found.floor(cell),
        "rounds": {name: values for name, record in found.records.items() if (values := record.values(cell))},
        "best_peer": peer and peer.name,
        "speedup": speedup and asdict(speedup),
        "streaming": {name: seen for name, record in found.records.items() if (seen := streaming(record, cell))},
    }


def write(found: Findings, out: Path) -> list[Path]:
    """JSON and, if matplotlib is there, a picture, under a folder named after the CPU."""
    path = cpu_result(out, found.machine, found.shape)
    write_json(path, as_json(found))
    cells = [cell for cell in found.offline if not cell.is_ttft]
    size = (2.5 + 2.8 * len(cells), 4.8)
    return [path, *draw(path.with_suffix(""), size, lambda figure, theme: _bars(found, cells, figure, theme))]


def _bars(found: Findings, cells: list[Cell], figure: Any, theme: Theme) -> None:
    """Tokens per second, one group for each number of requests, and the floors above them."""
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
