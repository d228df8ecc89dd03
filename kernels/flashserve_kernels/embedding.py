"""Rows of an embedding table."""

from __future__ import annotations

from torch import Tensor


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """table: [V, D]; ids: [T], int32 or int64, each in [0, V). Returns [T, D]."""
    return table.index_select(0, ids)
