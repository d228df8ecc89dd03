"""Token embedding and language-model head, which share one table in many models."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve.layers.linear import load_packed
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import LinearWeight, Ops


class Embedding:
    """A table of one row per token or position."""

    def __init__(self, ops: Ops, table: Tensor, scale: float = 1.0) -> None:
        """scale: what rows are multiplied with."""
        self._ops, self._scale = ops, scale
        self.table = table

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [T] int64. Returns [T, hidden]."""
        return self._ops.embedding(self.table, ids, self._scale)

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


class SplitEmbedding:
    """A table of which each rank has some rows."""

    def __init__(self, ops: Ops, part: Tensor, vocab_size: int, ranks: Ranks, scale: float) -> None:
        """part: [ceil(vocab / ranks), hidden], the last rank's filled up with anything."""
        first, rows = ranks.rank * part.shape[0], part.shape[0]
        self._table = torch.cat((part, part.new_zeros((1, part.shape[1]))))
        own = torch.arange(vocab_size, device=part.device) - first
        # The row of each token: the one of zeros for those of other ranks.
        self._rows = own.where((own >= 0) & (own < rows), rows)[:, None]
        self._ops, self._scale, self._sum = ops, scale, ranks.all_reduce

    def __call__(self, ids: Tensor) -> Tensor:
        """ids: [T] int64. Returns [T, hidden]."""
        rows = self._ops.embedding(self._rows, ids).view(-1)
        return self._sum(self._ops.embedding(self._table, rows, self._scale))


class LMHead:
    """Hidden states to logits, without bias."""

    def __init__(
        self, ops: Ops, weight: LinearWeight, vocab_size: int, ranks: Ranks, softcap: float | None = None
    ) -> None:
        """weight: [vocab, hidden], packed, or this rank's [ceil(vocab / ranks), hidden]. softcap: as in Ops.logits."""
        self._ops, self._softcap = ops, softcap
        self._vocab_size = vocab_size
        self._gather = ranks.all_gather if ranks.size > 1 else None
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x: [N, hidden]. Returns [N, vocab]."""
        logits = self._ops.logits(x, self.weight, self._softcap)
        return logits if self._gather is None else self._gather(logits)[:, : self._vocab_size]


def load_embedding_and_head(
    weights: WeightSource,
    embedding_name: str,
    head_name: str | None,
    vocab_size: int,
    hidden_size: int,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Embedding | PackedEmbedding | SplitEmbedding, LMHead]:
    """Both layers; ``head_name`` None ties them. scale: of embedded tokens, not of the head; softcap: of the logits.

    A tied table would be in memory twice where the head is packed (21% of a 135M model). There the lookup reads
    the file's memory map, which costs only the rows that are used, if the file has the model's dtype.
    """
    shape, ops, ranks = (vocab_size, hidden_size), weights.ops, weights.ranks
    own_name = head_name or embedding_name

    def head_of(weight: LinearWeight) -> LMHead:
        return LMHead(ops, weight, vocab_size, ranks, softcap)

    if ranks.size > 1:
        part = _read_rows(weights, embedding_name, shape)
        head = part if head_name is None else _read_rows(weights, own_name, shape)
        packed = weights.format.pack_head(ops, head, False)
        return SplitEmbedding(ops, part, vocab_size, ranks, scale), head_of(packed)
    stored = weights.grouped(embedding_name, shape)
    if stored is not None and weights.format.keeps(ops):
        packed = ops.pack_linear(stored)
        head = packed if head_name is None else _load_head(weights, head_name, shape)
        return PackedEmbedding(ops, packed, weights.dtype, scale), head_of(head)
    if head_name is None and not ops.packs(weights.dtype):
        table = weights.read(embedding_name, shape)
        return Embedding(ops, table, scale), head_of(weights.format.pack_head(ops, table, False))
    mapped = weights.mapped(embedding_name, shape) if head_name is None else None
    table = weights.read(embedding_name, shape) if mapped is None else mapped
    return Embedding(ops, table, scale), head_of(_load_head(weights, own_name, shape))


def _load_head(weights: WeightSource, name: str, shape: tuple[int, int]) -> LinearWeight:
    stored = [weights.grouped(name, shape)]
    return load_packed(weights, shape, lambda weight: weights.read_into(name, weight), stored, head=True)


def _read_rows(weights: WeightSource, name: str, shape: tuple[int, int]) -> Tensor:
    """This rank's rows of a vocabulary, the last rank's filled up with zeros."""
    ranks, rows = weights.ranks, -(-shape[0] // weights.ranks.size)
    own = weights.read(name, shape)[ranks.rank * rows : (ranks.rank + 1) * rows]
    part = own.new_zeros((rows, shape[1]))
    part[: own.shape[0]] = own
    return part


def load_table(weights: WeightSource, name: str, rows: int, columns: int) -> Embedding:
    """A table of its own, such as learned positions."""
    return Embedding(weights.ops, weights.read(name, (rows, columns)))
