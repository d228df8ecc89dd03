"""Token embedding and language-model head, which share one table in many models."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve.layers.linear import load_packed
from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import embedding, linear, packing_pays


class Embedding:
    """A table of one row per token or position."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [T] int64. Returns [T, hidden]."""
        return embedding(self.table, ids)


class LMHead:
    """Hidden states to logits, without bias."""

    def __init__(self, weight: Tensor) -> None:
        """weight: [vocab, hidden], plain or packed."""
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [N, hidden]. Returns [N, vocab]."""
        return linear(x, self.weight)


def load_embedding_and_head(
    weights: WeightSource, embedding_name: str, head_name: str | None, vocab_size: int, hidden_size: int
) -> tuple[Embedding, LMHead]:
    """Both layers; ``head_name`` None ties them.

    A tied table would be in memory twice where the head is packed (21% of a 135M model). There the lookup reads
    the file's memory map, which costs only the rows that are used; without a map the head stays unpacked.
    """
    shape = (vocab_size, hidden_size)
    if head_name is not None:
        table = weights.read(embedding_name, shape)
        head = load_packed(weights, shape, lambda weight: weights.read_into(head_name, weight))
        return Embedding(table), LMHead(head)
    if packing_pays(weights.dtype, weights.device):
        mapped = weights.mapped(embedding_name, shape)
        if mapped is not None:
            head = load_packed(weights, shape, lambda weight: weights.read_into(embedding_name, weight))
            return Embedding(mapped), LMHead(head)
    table = weights.read(embedding_name, shape)
    return Embedding(table), LMHead(table)


def load_table(weights: WeightSource, name: str, rows: int, columns: int) -> Embedding:
    """A table of its own, such as learned positions."""
    return Embedding(weights.read(name, (rows, columns)))


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows whose logits are wanted. x: [T, hidden]; rows: [N] int64."""
    return x if rows.shape[0] == x.shape[0] else torch.index_select(x, 0, rows)
