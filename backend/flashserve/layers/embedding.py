"""Token embedding and language-model head, which share one table in many models."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve.layers.linear import load_packed
from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import LinearWeight, Ops


class Embedding:
    """A table of one row per token or position."""

    def __init__(self, ops: Ops, table: Tensor) -> None:
        self._ops = ops
        self.table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [T] int64. Returns [T, hidden]."""
        return self._ops.embedding(self.table, ids)

    def add_(self, x: Tensor, ids: Tensor) -> Tensor:
        """x: [T, hidden], to which the rows of ids [T] are added. Returns x."""
        return self._ops.add_embedding_(x, self.table, ids)


class PackedEmbedding:
    """A table that is kept in groups, packed as a linear's weight; a tied head is the same weight."""

    def __init__(self, ops: Ops, weight: LinearWeight, dtype: torch.dtype, scale: float) -> None:
        self._ops = ops
        self.weight = weight
        self._dtype = dtype
        self._scale = scale

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [T] int64. Returns [T, hidden]."""
        return self._ops.packed_embedding(self.weight, ids, self._dtype, self._scale)


class LMHead:
    """Hidden states to logits, without bias."""

    def __init__(self, ops: Ops, weight: LinearWeight) -> None:
        """weight: [vocab, hidden], packed."""
        self._ops = ops
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [N, hidden]. Returns [N, vocab]."""
        return self._ops.logits(x, self.weight)


def load_embedding_and_head(
    weights: WeightSource,
    embedding_name: str,
    head_name: str | None,
    vocab_size: int,
    hidden_size: int,
    scale: float = 1.0,
) -> tuple[Embedding | PackedEmbedding, LMHead]:
    """Both layers; ``head_name`` None ties them. scale: what embedded tokens, not the head, are multiplied with.

    A tied table would be in memory twice where the head is packed (21% of a 135M model). There the lookup reads
    the file's memory map, which costs only the rows that are used, if the file has the model's dtype.
    """
    shape, ops = (vocab_size, hidden_size), weights.ops
    stored = weights.grouped(embedding_name, shape)
    if stored is not None and weights.format.keeps(ops):
        packed = ops.pack_linear(stored)
        lookup = PackedEmbedding(ops, packed, weights.dtype, scale)
        return lookup, LMHead(ops, packed if head_name is None else _load_head(weights, head_name, shape))
    if head_name is None and scale == 1.0 and not ops.packs(weights.dtype):
        table = weights.read(embedding_name, shape)
        return Embedding(ops, table), LMHead(ops, weights.format.pack_head(ops, table, False))
    mapped = weights.mapped(embedding_name, shape) if head_name is None and scale == 1.0 else None
    table = weights.read(embedding_name, shape) if mapped is None else mapped
    if scale != 1.0:
        table.mul_(scale)
    return Embedding(ops, table), LMHead(ops, _load_head(weights, head_name or embedding_name, shape))


def _load_head(weights: WeightSource, name: str, shape: tuple[int, int]) -> LinearWeight:
    return load_packed(weights, [(name, shape[0])], shape[1], head=True)


def load_table(weights: WeightSource, name: str, rows: int, columns: int) -> Embedding:
    """A table of its own, such as learned positions."""
    return Embedding(weights.ops, weights.read(name, (rows, columns)))
