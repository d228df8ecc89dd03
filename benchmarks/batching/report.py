"""Everything that was measured, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.batching.grid import Grid
from benchmarks.batching.load import NAIVE_REQUESTS, Mixed, Point
from benchmarks.batching.workload import OURS, SERVED, SYSTEMS
from benchmarks.common.engines import CONTINUOUS, ENGINES, NAIVE, STATIC
from benchmarks.common.results import rounded
from benchmarks.common.tables import markdown

PAPER = "the PagedAttention paper saw 20-38% used of contiguous reservations, and above 96% of pages"


@dataclass
class Findings:
    """What was measured; parts that were not asked for are empty."""

    shape: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    grid: Grid
    ceilings: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    mixed: Mixed | None = None
    points: list[Point] = field(default_factory=list)

    @property
    def subtitle(self) -> str:
        return (
            f"{self.shape} in bfloat16, random weights; {self.machine['cores']} cores of {self.machine['cpu']}; "
            f"transformers {self.versions.get('transformers', '?')}"
        )


def as_json(found: Findings) -> dict[str, Any]:
    mixed = found.mixed and {
        "batch": found.mixed.batch,
        "outputs": found.mixed.work.outputs,
        "prompts": [len(prompt) for prompt in found.mixed.work.prompts],
        "systems": found.mixed.systems,
    }
    return rounded(
        {
            "shape": found.shape,
            "machine": found.machine,
            "ceilings": found.ceilings,
            "settings": found.settings,
            "versions": found.versions,
            "grid": {"prompt": found.grid.prompt, "measured": found.grid.as_json()},
            "mixed": mixed,
            "load": [point.as_json() for point in found.points],
        }
    )


def as_markdown(found: Findings) -> str:
    machine = found.machine
    lines = [
        f"# Batching: {found.shape}, bfloat16, random weights",
        "",
        f"{machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, "
        f"{found.ceilings['read_gb_s']:.0f} GB/s read, {found.ceilings['gemm_tflop_s']:.2f} TFLOP/s in bfloat16; "
        + ", ".join(f"{name} {version}" for name, version in found.versions.items())
        + ". Greedy, no prefix caching, no end token. Output tokens per second of all users, prompts included.",
    ]
    if found.grid.rates:
        lines += _rate_lines(found.grid) + _speedup_lines(found.grid)
    if found.mixed is not None:
        lines += _mixed_lines(found.mixed)
    if found.points:
        lines += _load_lines(found.points)
    return "\n".join(lines) + "\n"


def _rate_lines(grid: Grid) -> list[str]:
    requests, output = max(grid.requests), max(grid.outputs)
    rows = [["tokens/s (times one by one)", *(f"batch {batch}" for batch in grid.batches)]]
    for name in SYSTEMS:
        cells = []
        for batch in grid.batches if name != NAIVE else [1]:
            rate, times = grid.rate(name, requests, batch, output), grid.speedup(name, requests, batch, output)
            cells.append(f"{rate:.0f} ({times:.1f}×)" if rate >= 99.5 else f"{rate:.1f} ({times:.1f}×)")
        rows.append([ENGINES[name].title, *cells, *["-"] * (len(grid.batches) - len(cells))])
    return ["", f"## {requests} requests of {grid.prompt} tokens in, {output} out", "", *markdown(rows)]


def _speedup_lines(grid: Grid) -> list[str]:
    lines = ["", "## Times one by one, for each number of requests, batch and output length"]
    for name in (SERVED, STATIC, CONTINUOUS):
        rows = [["output, requests", *(f"batch {batch}" for batch in grid.batches)]]
        for output in grid.outputs:
            for requests in grid.requests:
                cells = [f"{grid.speedup(name, requests, batch, output):.1f}" for batch in grid.batches]
                rows.append([f"{output} out, {requests}", *cells])
        lines += ["", f"{ENGINES[name].title}:", "", *markdown(rows)]
    lines += ["", (
        "Equal lengths pass in waves that cost the same: one wave of a static batch was measured, two of the others, "
        "and more requests have that rate. One by one was measured once per output length."
    )]  # fmt: skip
    return lines


def _mixed_lines(mixed: Mixed) -> list[str]:
    lengths = [len(prompt) for prompt in mixed.work.prompts]
    rows = [["", "tokens/s", "times one by one", "computed for nobody", "places busy", "latency p50, s", "p95, s"]]
    naive = mixed.systems.get(NAIVE, {}).get("tokens_per_s")
    for name, found in mixed.systems.items():
        times = f"{found['tokens_per_s'] / naive:.1f}" if naive else "-"
        shares = [f"{found[key]:.0%}" if key in found else "-" for key in ("wasted", "busy")]
        latency = [f"{found[key]:.1f}" if name != NAIVE else "-" for key in ("latency_p50_s", "latency_p95_s")]
        rows.append([ENGINES[name].title, f"{found['tokens_per_s']:.1f}", times, *shares, *latency])
    lines = [
        "",
        f"## {len(mixed.work)} requests of mixed lengths at once, batch {mixed.batch}",
        "",
        f"{min(lengths)}-{max(lengths)} tokens in, {min(mixed.work.outputs)}-{max(mixed.work.outputs)} out; "
        f"one by one: the first {NAIVE_REQUESTS} of them.",
        "",
        *markdown(rows),
    ]
    if "kv" in (ours := mixed.systems.get(OURS, {})):
        rows = [["KV memory that is set aside for running requests", "used"]]
        rows += [[name, f"{share:.1%}"] for name, share in ours["kv"].items()]
        lost = f"{ours['kv_lost_tokens']:.1f} tokens per request are lost to blocks of {ours['block_size']}"
        lines += ["", *markdown(rows), "", f"Averages over steps; {lost}; {PAPER}."]
    return lines


def _load_lines(points: Sequence[Point]) -> list[str]:
    rows = [["", "requests/s", "tokens/s", "ms per token p50", "p95", "first token p50, ms", "p95, ms"]]
    for point in points:
        keys = ("normalised_p50_ms", "normalised_p95_ms", "ttft_p50_ms", "ttft_p95_ms")
        offered = f"{point.offered:g}" + ("" if point.keeps_up else " (too much)")
        latency = [f"{point.latency[key]:.0f}" for key in keys]
        rows.append([ENGINES[point.system].title, offered, f"{point.tokens_per_s:.1f}", *latency])
    return ["", "## Mixed lengths arriving at random: throughput and latency", "", *markdown(rows), "", (
        "Milliseconds per output token: from a request's arrival to its last token, waiting included, divided by its "
        "tokens. What gives all tokens at once has its first token at the end."
    )]  # fmt: skip
