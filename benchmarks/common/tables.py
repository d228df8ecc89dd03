"""Tables as text and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a text table, its first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (text.ljust(widths[0]) if i == 0 else text.rjust(widths[i]) for i, text in enumerate(row))
        lines.append("  ".join([first, *others]))
    return lines


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|---" * len(rows[0]) + "|", *body]


def keyed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a text table whose columns are the keys of all rows, in the order in which they occur. Keys that begin
    with ``of_`` are shares."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(key, row.get(key)) for key in columns] for row in rows]
    widths = [max(map(len, (key, *column))) for key, column in zip(columns, zip(*cells, strict=True), strict=True)]
    lines = [columns, *cells]
    return ["   " + "  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines]


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if key.startswith("of_"):
            return f"{value:.1%}"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
