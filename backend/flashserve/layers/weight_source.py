"""Where layers take their weights from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WeightFormat
from flashserve_kernels import Ops
from flashserve_kernels.grouped import GroupedRows


class WeightSource(Protocol):
    """Named tensors of a checkpoint, in the dtype and on the device that the model runs with.

    A layer asks for what it needs by name and shape, so building a model loads it. Raises ConfigError where a
    tensor is missing or has another shape.
    """

    dtype: torch.dtype
    device: torch.device
    ops: Ops
    """What the model's layers call."""
    format: WeightFormat
    """What becomes of linears' weights."""
    ranks: Ranks
    """Who else loads this model, and which part is this process's."""

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor."""
        ...

    def grouped(self, name: str, shape: tuple[int, int]) -> GroupedRows | None:
        """A linear's matrix that is stored in groups, as it is stored; None where it is not. shape: (outputs, inputs),
        also where ``read_into`` gives it the other way round."""
        ...

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor to its final place, converting the dtype; ``out`` may be any strided view."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A copy of a tensor."""
        ...

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        """Memory to put a tensor together in; the next call gives the same memory again. One buffer for all, since
        freed ones of different sizes left holes of a third of the weights in the heap."""
        ...

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """The tensor inside the file's memory map: only rows that are read take memory. None where the dtype or
        the device differ. Never write to it."""
        ...


def read_part(weights: WeightSource, name: str, out: Tensor, dim: int) -> None:
    """Copy to ``out`` this rank's part of a tensor that is cut along ``dim`` into as many equal ones."""
    ranks = weights.ranks
    if ranks.size == 1:
        weights.read_into(name, out)
    else:
        shape, size = list(out.shape), out.shape[dim]
        shape[dim] = size * ranks.size
        out.copy_(weights.read(name, tuple(shape)).narrow(dim, ranks.rank * size, size))
