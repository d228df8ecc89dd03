"""Lists in pages, as OpenAI's clients walk through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request

from ..batch.records import Named
from ..errors import invalid

_MOST, _DEFAULT = 10_000, 100
PAGE: dict[str, Any] = {
    "parameters": [
        {"name": "limit", "in": "query",
         "schema": {"type": "integer", "minimum": 1, "maximum": _MOST, "default": _DEFAULT}},
        {"name": "after", "in": "query", "schema": {"type": "string"}},
        {"name": "order", "in": "query", "schema": {"enum": ["asc", "desc"], "default": "desc"}},
    ]
}  # fmt: skip
"""The query of such a list, for /docs."""


def page(request: Request, newest_first: Sequence[Named]) -> dict[str, Any]:
    """The part of a list that is asked for. Raises ApiError."""
    limit = request.query_params.get("limit", str(_DEFAULT))
    if not limit.isdecimal() or not 1 <= int(limit[:9]) <= _MOST:
        raise invalid("limit", f"limit must be an integer in [1, {_MOST}]")
    order = request.query_params.get("order", "desc")
    if order not in ("asc", "desc"):
        raise invalid("order", "order must be asc or desc")
    items = list(newest_first) if order == "desc" else list(reversed(newest_first))
    after = request.query_params.get("after")
    if after is not None:
        places = [index for index, item in enumerate(items) if item.id == after]
        if not places:
            raise invalid("after", f"after: {after[:100]!r} is not in the list")
        items = items[places[0] + 1 :]
    shown = items[: int(limit)]
    ids = [item.id for item in shown]
    return {
        "object": "list",
        "data": shown,
        "first_id": ids[0] if ids else None,
        "last_id": ids[-1] if ids else None,
        "has_more": len(items) > len(shown),
    }
