"""Linear layers: shard loading, the order of fused projections, splits over ranks, and packing in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from flashserve.layers.weight_source import WeightSource, read_part
from flashserve_kernels import Activation, LinearWeight

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

        def read_shards(weight: Tensor) -> None:
            first = 0
            for name, size in shards:
                rows = weight[first : first + size]
                stored = rows.t() if transposed else rows
                if split is None:
                    weights.read_into(f"{prefix}{name}.weight", stored)
                else:
                    read_part(weights, f"{prefix}{name}.weight", stored, int((split == "inputs") != transposed))
                if own_bias is not None:
                    part = own_bias[first : first + size]
                    if split == "outputs":
                        read_part(weights, f"{prefix}{name}.bias", part, 0)
                    else:
                        weights.read_into(f"{prefix}{name}.bias", part)
                first += size

        self.weight = load_packed(weights, (out_features, in_features), read_shards, self.gated)
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


def load_packed(
    weights: WeightSource, shape: tuple[int, int], read: Callable[[Tensor], None], gated: bool = False
) -> LinearWeight:
    """The weight that ``read`` fills in, as the ops want it."""
    packs = weights.ops.packs(weights.dtype)
    weight = weights.scratch(shape) if packs else torch.empty(shape, dtype=weights.dtype, device=weights.device)
    read(weight)
    return weights.ops.pack_linear(weight, gated=gated, quantization=weights.quantization)
