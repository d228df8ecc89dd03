"""Rows of tables, and the tokens that a step reads."""

from __future__ import annotations

import torch
from torch import Tensor


def embedding(table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
    """``table[ids] * scale``. table: [V, D]; ids: [T], int32 or int64, each in [0, V). Returns [T, D]."""
    rows = table.index_select(0, ids)
    return rows if scale == 1.0 else rows.mul_(scale)


def add_embedding_(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``x += table[ids]``, for learned positions. x: [T, D]; table: [V, D]; ids: [T]. Returns x."""
    return x.add_(table.index_select(0, ids))


def gather_tokens(token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
    """The host's token where it knows one, else the last sample of the token's slot.

    token_ids: [T] int64, negative: unknown; last_tokens: [slots] int64; slots: [T] int64. Returns [T] int64.
    """
    return torch.where(token_ids < 0, last_tokens.index_select(0, slots), token_ids)
