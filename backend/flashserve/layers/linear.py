"""Linear layers: shard loading, the order of fused projections, splits over ranks, and packing in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from flashserve.layers.weight_source import WeightSource, read_part
from flashserve_kernels import Activation, LinearWeight
from flashserve_kernels.grouped import GroupedRows, JoinedRows

Split = Literal["outputs", "inputs"]
"""What each rank has a part of. A linear of split outputs gives its own part; the next, of split inputs, takes that
part and adds up the ranks' results."""


class Linear:
    """``x @ W.T + b`` whose outputs are one or several checkpoint tensors, in the order given.

    Fused projections (query, key, value; gate, up) are one matrix product instead of several.
    """

    gated = False

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        in_features: int,
        shards: Sequence[tuple[str, int]],
        bias: bool = False,
        transposed: bool = False,
        split: Split | None = None,
    ) -> None:
        """Load ``{prefix}{name}.weight`` [size, in_features] (and ``.bias``) for each (name, size) of ``shards``.

        transposed: the checkpoint holds [in_features, size], as GPT-2's Conv1D does. split: sizes are those of the
        whole linear, of which this rank loads its part. Raises ConfigError where they cannot be shared.
        """
        ranks = weights.ranks
        if split == "inputs":
            in_features = ranks.share(in_features, "inputs of a linear layer")
        if split == "outputs":
            shards = [(name, ranks.share(size, "outputs of a linear layer")) for name, size in shards]
        out_features = sum(size for _, size in shards)
        own_bias = torch.empty(out_features, dtype=weights.dtype, device=weights.device) if bias else None

        def read_shards(kind: str, out: Tensor) -> None:
            first = 0
            for name, size in shards:
                rows = out[first : first + size]
                stored = rows.t() if transposed and kind == "weight" else rows
                axis = _split_axis(split, kind, transposed)
                if axis is None:
                    weights.read_into(f"{prefix}{name}.{kind}", stored)
                else:
                    read_part(weights, f"{prefix}{name}.{kind}", stored, axis)
                first += size

        if own_bias is not None:
            read_shards("bias", own_bias)
        in_groups = ranks.size == 1  # rows of whole tensors
        stored = [weights.grouped(f"{prefix}{name}.weight", (size, in_features)) for name, size in shards if in_groups]
        self.weight = load_packed(
            weights, (out_features, in_features), lambda out: read_shards("weight", out), stored, gated=self.gated
        )
        # Of the sum over ranks it is one term.
        self.bias = None if split == "inputs" and ranks.rank > 0 else own_bias
        self._ops = weights.ops
        self._sum = ranks.all_reduce if split == "inputs" and ranks.size > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in_features]. Returns [T, sum of the shards' sizes]."""
        out = self._ops.linear(x, self.weight, self.bias)
        return out if self._sum is None else self._sum(out)


class GatedLinear(Linear):
    """A gated unit's first half: ``activation(gate(x)) * up(x)``."""

    gated = True

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        in_features: int,
        names: tuple[str, str],
        size: int,
        bias: bool,
        activation: Activation,
        split: Split | None = None,
    ) -> None:
        """names: those of the gate's and the up projection's tensors, of ``size`` outputs each."""
        super().__init__(weights, prefix, in_features, [(name, size) for name in names], bias, split=split)
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in_features]. Returns [T, size]."""
        return self._ops.linear_gated(x, self.weight, self.activation, self.bias)


def _split_axis(split: Split | None, kind: str, transposed: bool) -> int | None:
    """The axis of a stored weight or bias of which a rank has its part; None: it has all."""
    if kind == "bias":
        return 0 if split == "outputs" else None
    return None if split is None else int((split == "inputs") != transposed)


def load_packed(
    weights: WeightSource,
    shape: tuple[int, int],
    read: Callable[[Tensor], None],
    stored: Sequence[GroupedRows | None] = (),
    *,
    gated: bool = False,
    head: bool = False,
) -> LinearWeight:
    """The weight as the ops want it. stored: what is in groups of its outputs' tensors; where all are, and the ops take
    them so, they stay. Else it is what ``read`` fills in."""
    ops, format = weights.ops, weights.format
    in_groups = tuple(rows for rows in stored if rows is not None and format.keeps(ops))
    if in_groups and len(in_groups) == len(stored):
        return ops.pack_linear(JoinedRows(in_groups), gated=gated)
    in_scratch = ops.packs(weights.dtype)
    weight = weights.scratch(shape) if in_scratch else torch.empty(shape, dtype=weights.dtype, device=weights.device)
    read(weight)
    return (format.pack_head if head else format.pack)(ops, weight, gated)
