"""The tensors of GGUF files under our names: dequantised where they are read, or as the blocks that they are."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.weight_format import WeightFormat
from flashserve.models.file_weights import FileWeights, give_back, view_file
from flashserve.models.gguf.dequantize import PLAIN, dequantize
from flashserve.models.gguf.groups import GROUPED_TYPES, GgufRows
from flashserve.models.gguf.header import TensorInfo
from flashserve_kernels import Ops

_PART_ELEMENTS = 1 << 20
"""Numbers that are dequantised at once: 4 MB of float32, which the caches still hold when they are copied on."""


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of a file, and what the model wants it to be."""

    info: TensorInfo
    memory: mmap.mmap
    """The file."""
    head_rows: int | None = None
    """Rows of a head: its rows lie in pairs (0, n/2, 1, n/2 + 1, …) and are wanted in order."""
    transposed: bool = False
    """The model wants [columns, rows]."""
    plus_one: bool = False
    """The file has 1 added."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As the model wants it."""
        return tuple(reversed(self.info.shape)) if self.transposed else self.info.shape

    def blocks(self, first: int, last: int) -> Tensor:
        """Rows [first, last) as they lie in the file, inside its memory map: [rows, bytes of a row] uint8."""
        size = self.info.row_bytes
        begin = self.info.begin + first * size
        return view_file(self.memory, torch.uint8, (last - first) * size, begin).view(last - first, size)

    def read(self, first: int, last: int) -> Tensor:
        """Rows [first, last) as numbers, in the file's order: [rows, numbers of a row]."""
        values = dequantize(self.blocks(first, last), self.info.type_number)
        return values.float() - 1 if self.plus_one else values

    def places(self, first: int, last: int) -> Tensor:
        """Where rows [first, last) of the file, or numbers of a vector, are wanted: [rows] int64."""
        rows = torch.arange(first, last)
        if self.head_rows is None:
            return rows
        within = rows % self.head_rows
        return rows - within + within % 2 * (self.head_rows // 2) + within // 2


class GgufWeights(FileWeights):
    """Implements layers' WeightSource over tensors of GGUF files."""

    def __init__(
        self,
        tensors: Mapping[str, ModelTensor],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        format: WeightFormat,
    ) -> None:
        super().__init__({name: tensor.info.num_bytes for name, tensor in tensors.items()}, dtype, device, ops, format)
        self._tensors = tensors

    def read_into(self, name: str, out: Tensor) -> None:
        tensor = self._find(name, tuple(out.shape))
        if out.dim() == 1:
            out[tensor.places(0, out.shape[0])] = tensor.read(0, 1)[0].to(out)
            self._done(tensor, 0, 1)
            return
        if tensor.transposed:
            out = out.t()
        rows, step = tensor.info.num_rows, max(1, _PART_ELEMENTS // tensor.info.shape[-1])
        for first in range(0, rows, step):
            last = min(rows, first + step)
            part = tensor.read(first, last)
            if tensor.head_rows is None:
                out[first:last].copy_(part)
            else:
                out[tensor.places(first, last)] = part.to(out)
            self._done(tensor, first, last)

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = self._find(name, shape)
        is_as_wanted = not (tensor.transposed or tensor.plus_one or tensor.head_rows)
        if PLAIN.get(tensor.info.type_number) != self.dtype or self.device.type != "cpu" or not is_as_wanted:
            return None
        return dequantize(tensor.blocks(0, tensor.info.num_rows), tensor.info.type_number).view(shape)

    def grouped(self, name: str, shape: tuple[int, int]) -> GgufRows | None:
        stored = self._tensors.get(name)
        tensor = self._find(name, shape[::-1] if stored is not None and stored.transposed else shape)
        type = GROUPED_TYPES.get(tensor.info.type_number)
        if type is None or tensor.plus_one:
            return None
        order = None
        if tensor.head_rows is not None:  # which row of the file each of ours is
            places = tensor.places(0, shape[0])
            order = torch.empty_like(places).scatter_(0, places, torch.arange(shape[0]))
        place = f"{tensor.info.file.name}: tensor {tensor.info.name}"
        blocks = tensor.blocks(0, shape[0])
        return GgufRows(type, place, blocks, order, lambda first, last: self._done(tensor, first, last))

    def _done(self, tensor: ModelTensor, first: int, last: int) -> None:
        size = tensor.info.row_bytes
        give_back(tensor.memory, tensor.info.begin + first * size, (last - first) * size)
        self._advance((last - first) * size)

    def _find(self, name: str, shape: tuple[int, ...]) -> ModelTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ConfigError(f"the weights lack the tensor {name} {list(shape)}")
        if tensor.shape != shape:
            raise ConfigError(
                f"{tensor.info.file.name}: tensor {tensor.info.name} has shape {list(tensor.info.shape)}, "
                f"and the metadata ask for {name} {list(shape)}"
            )
        self._use(name)
        return tensor
