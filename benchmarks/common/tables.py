"""Tables in Markdown, which a terminal shows as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with aligned columns; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return [head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body]


def keyed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The same, whose columns are the keys of all rows, in the order in which they occur. Keys that begin with ``of_``
    are shares."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return markdown([columns, *([_cell(key, row.get(key)) for key in columns] for row in rows)])


def _cell(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        if key.startswith("of_"):
            return f"{value:.1%}"
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
