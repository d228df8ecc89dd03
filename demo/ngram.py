"""The baseline: an interpolated 5-gram model with modified Kneser-Ney smoothing, in NumPy.

Chen and Goodman (1998), three discounts per order estimated from the counts of counts. An n-gram is one
64-bit key (5 x 12 bits for tokens, 5 x 9 for bytes), the tables are sorted arrays, and a lookup is a
binary search for all queries at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Order:
    """The tables of one order: discounted counts of the n-grams, and totals and mass per context."""

    keys: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray


def discounts(counts: np.ndarray) -> np.ndarray:
    """The amounts to take off a count of 0, 1, 2, and 3 or more."""
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array([0.0, 0.5, 0.5, 0.5])  # so few n-grams (single bytes) that it does not matter
    y = n1 / (n1 + 2 * n2)
    raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.clip(raw, [0, 0.05, 0.05, 0.05], [0, 1, 2, 3])


def _order(keys: np.ndarray, counts: np.ndarray, bits: int) -> Order:
    taken = discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(keys >> np.uint64(bits), return_index=True)
    totals = np.add.reduceat(counts, first).astype(np.float64)
    return Order(keys, counts - taken, contexts, totals, np.add.reduceat(taken, first) / totals)


def _find(table: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the values in a sorted table, and whether they are there."""
    at = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return at, table[at] == values


class KneserNey:
    """An n-gram model over symbols 0 .. vocab-1, of which `separator` starts every document."""

    def __init__(self, vocab: int, separator: int, order: int = 5) -> None:
        self.vocab, self.separator, self.order = vocab, separator, order
        self.bits = (vocab - 1).bit_length()
        if self.bits * order > 64:
            raise ValueError("an n-gram does not fit a key of 64 bits")
        self.orders: list[Order] = []

    def _keys(self, documents: list[np.ndarray]) -> np.ndarray:
        """The n-gram of highest order which ends at each symbol of the documents."""
        pad = self.order - 1
        padding = np.full(pad, self.separator, dtype=np.uint64)
        parts = [part for document in documents for part in (padding, document.astype(np.uint64))]
        symbols = np.concatenate(parts)
        real = np.concatenate([np.full(len(p), i % 2 == 1) for i, p in enumerate(parts)])
        keys = np.zeros(len(symbols) - pad, dtype=np.uint64)
        for k in range(self.order):
            keys = (keys << np.uint64(self.bits)) | symbols[k : len(symbols) - pad + k]
        return keys[real[pad:]]

    def fit(self, documents: list[np.ndarray]) -> None:
        """Count. Orders below the highest count in how many contexts an n-gram was seen."""
        keys, counts = np.unique(self._keys(documents), return_counts=True)
        self.orders = [_order(keys, counts, self.bits)]
        for n in range(self.order - 1, 0, -1):
            mask = np.uint64((1 << (n * self.bits)) - 1)
            keys, counts = np.unique(keys & mask, return_counts=True)
            self.orders.insert(0, _order(keys, counts, self.bits))

    def probabilities(self, documents: list[np.ndarray]) -> np.ndarray:
        """The probability of every symbol of the documents, each document from its start."""
        keys = self._keys(documents)
        p = np.full(len(keys), 1.0 / self.vocab)
        for n, order in enumerate(self.orders, start=1):
            grams = keys & np.uint64((1 << (n * self.bits)) - 1)
            at, known = _find(order.contexts, grams >> np.uint64(self.bits))
            gram_at, seen = _find(order.keys, grams)
            count = np.where(seen, order.discounted[gram_at], 0.0)
            p = np.where(known, count / order.totals[at] + order.backoff[at] * p, p)
        return p

    def bits_total(self, documents: list[np.ndarray]) -> float:
        """The code length of the documents in bits."""
        return float(-np.log2(self.probabilities(documents)).sum())
