"""How long a step's rows are, as far as the host knows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowLengths:
    """What the host knows of a step's rows when their work is queued: bounds, where that is captured or recorded."""

    longest: int
    """Tokens of a row."""
    min_singles: int = 0
    max_singles: int = 0
    """How many of the first rows have one token each; 0: not said."""
    query_lens: Sequence[int] = ()
    seq_lens: Sequence[int] = ()
    """Those of each row, for ops that cannot be captured."""
