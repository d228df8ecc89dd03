"""Linear layers: shard loading, the order of fused projections, and packing in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import LinearWeight
from flashserve_kernels.grouped import JoinedRows


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
    ) -> None:
        """Load ``{prefix}{name}.weight`` [size, in_features] (and ``.bias``) for each (name, size) of ``shards``.

        transposed: the checkpoint holds [in_features, size], as GPT-2's Conv1D does.
        """
        out_features = sum(size for _, size in shards)
        self.bias = torch.empty(out_features, dtype=weights.dtype, device=weights.device) if bias else None
        named = [(f"{prefix}{name}.weight", size) for name, size in shards]
        self.weight = load_packed(weights, named, in_features, gated=self.gated, transposed=transposed)
        first = 0
        for name, size in shards:
            if self.bias is not None:
                weights.read_into(f"{prefix}{name}.bias", self.bias[first : first + size])
            first += size
        self._ops = weights.ops

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in_features]. Returns [T, sum of the shards' sizes]."""
        return self._ops.linear(x, self.weight, self.bias)


class GatedLinear(Linear):
    """SwiGLU's first half: ``silu(gate(x)) * up(x)``."""

    gated = True

    def __init__(
        self, weights: WeightSource, prefix: str, in_features: int, names: tuple[str, str], size: int, bias: bool
    ) -> None:
        """names: those of the gate's and the up projection's tensors, of ``size`` outputs each."""
        super().__init__(weights, prefix, in_features, [(name, size) for name in names], bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, in_features]. Returns [T, size]."""
        return self._ops.linear_silu_and_mul(x, self.weight, self.bias)


def load_packed(
    weights: WeightSource,
    tensors: Sequence[tuple[str, int]],
    inputs: int,
    gated: bool = False,
    transposed: bool = False,
    head: bool = False,
) -> LinearWeight:
    """The weight whose outputs are those of some tensors (name, outputs), one after the other, as the ops want it."""
    ops, format = weights.ops, weights.format
    stored = [] if transposed else [weights.grouped(name, (size, inputs)) for name, size in tensors]
    kept = [rows for rows in stored if rows is not None and format.keeps(ops)]
    if len(kept) == len(tensors):
        return ops.pack_linear(JoinedRows(tuple(kept)), gated=gated)
    shape = (sum(size for _, size in tensors), inputs)
    in_scratch = ops.packs(weights.dtype)
    weight = weights.scratch(shape) if in_scratch else torch.empty(shape, dtype=weights.dtype, device=weights.device)
    first = 0
    for name, size in tensors:
        rows = weight[first : first + size]
        weights.read_into(name, rows.t() if transposed else rows)
        first += size
    return (format.pack_head if head else format.pack)(ops, weight, gated)
