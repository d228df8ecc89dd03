"""A prompt's embedding as its tokens are computed: which hidden states are asked for, and what they come to."""

from __future__ import annotations

import numpy as np

from flashserve.protocol import Pooling


class PooledPrompt:
    """The sum of the pooled tokens' final hidden states so far. A prompt in chunks adds one sum for each; on the host,
    in float32, for a chunk's sum is one vector."""

    def __init__(self, pooling: Pooling, num_tokens: int) -> None:
        self._pooling = pooling
        self._num_tokens = num_tokens
        self._sum: np.ndarray | None = None

    def rows_of(self, start: int, end: int) -> tuple[int, int] | None:
        """Which tokens of a row of positions ``start .. end - 1`` are pooled, counted from its first; None if the row
        need not answer. A row that ends the prompt always answers: that is how its end is known."""
        count = end - start
        if self._pooling == "mean":
            return 0, count
        if self._pooling == "cls" and start == 0:
            return 0, 1
        if end < self._num_tokens:
            return None
        return (count - 1 if self._pooling == "last" else count), count

    def add(self, row_sum: np.ndarray, start: int) -> None:
        """Take in the sum of a row, [hidden] float32. A prompt that is computed again, after a preemption, begins
        afresh with its first token."""
        self._sum = row_sum.copy() if start == 0 or self._sum is None else self._sum + row_sum

    def embedding(self) -> bytes:
        """[hidden] float32, little endian. All rows must have been added."""
        assert self._sum is not None
        count = self._num_tokens if self._pooling == "mean" else 1
        return (self._sum / np.float32(count)).astype("<f4").tobytes()
