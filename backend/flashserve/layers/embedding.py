"""Token embedding and language-model head, which share one table in many models."""

from __future__ import annotations

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
) -> tuple[Embedding, LMHead]:
    """Both layers; ``head_name`` None ties them. scale: what embedded tokens, not the head, are multiplied with.

    A tied table would be in memory twice where the head is packed (21% of a 135M model). There the lookup reads
    the file's memory map, which costs only the rows that are used, if the file has the model's dtype.
    """
    shape, ops = (vocab_size, hidden_size), weights.ops
    own_name = head_name or embedding_name
    if head_name is None and scale == 1.0 and not ops.packs(weights.dtype):
        table = weights.read(embedding_name, shape)
        return Embedding(ops, table), LMHead(ops, ops.pack_linear(table, quantization=weights.quantization))
    mapped = weights.mapped(embedding_name, shape) if head_name is None and scale == 1.0 else None
    table = weights.read(embedding_name, shape) if mapped is None else mapped
    if scale != 1.0:
        table.mul_(scale)
    head = load_packed(weights, shape, lambda weight: weights.read_into(own_name, weight))
    return Embedding(ops, table), LMHead(ops, head)


def load_table(weights: WeightSource, name: str, rows: int, columns: int) -> Embedding:
    """A table of its own, such as learned positions."""
    return Embedding(weights.ops, weights.read(name, (rows, columns)))
