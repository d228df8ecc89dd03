"""Safetensors checkpoints: their headers, and weights by memory map straight into their final place.

The format is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, and the
data. It is read here rather than through the safetensors library, because the pages of a tensor must be given
back once it is copied: else the file counts in this process's memory as well as the copy.
"""

from __future__ import annotations

import json
import logging
import math
import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WeightFormat
from flashserve.models.file_weights import FileWeights, give_back, map_file, matches, view_file
from flashserve_kernels import Ops

log = logging.getLogger(__name__)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_COPY_BYTES = 16 << 20
"""A large tensor is copied in parts of this size, so that at most one part is in memory twice."""
_MAX_HEADER_BYTES = 100 << 20  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies."""

    file: Path
    dtype: str
    """Safetensors' name: F32, BF16, …"""
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    num_bytes: int

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """All tensors of a model folder, from the headers alone."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError where there are no safetensors files or one of them is broken."""
        self.folder = folder
        self.files = _weight_files(folder)
        self.entries: dict[str, TensorEntry] = {}
        for file in self.files:
            self.entries.update(_read_header(file))

    @cached_property
    def dtype(self) -> str:
        """The dtype that most of the weights have, by our name."""
        totals: dict[str, int] = {}
        for entry in self.entries.values():
            totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.num_elements
        largest = max(totals, key=lambda name: totals[name], default="none")
        if largest not in DTYPE_NAMES:
            raise ConfigError(f"weights of type {largest} are not supported; supported: {', '.join(DTYPE_NAMES)}")
        return DTYPE_NAMES[largest]

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, read in parts."""
        first, second = self.entries[one], self.entries[other]
        if (first.dtype, first.shape) != (second.dtype, second.shape):
            return False
        with first.file.open("rb") as left, second.file.open("rb") as right:
            left.seek(first.begin)
            right.seek(second.begin)
            sizes = [min(_COPY_BYTES, first.num_bytes - at) for at in range(0, first.num_bytes, _COPY_BYTES)]
            return all(left.read(size) == right.read(size) for size in sizes)

    def sample(self, name: str, size: int) -> bytes:
        """Some bytes from the middle of a tensor."""
        entry = self.entries[name]
        num_bytes = entry.num_bytes
        with entry.file.open("rb") as stream:
            stream.seek(entry.begin + max(0, num_bytes - size) // 2)
            return stream.read(min(size, num_bytes))

    def read_number(self, name: str) -> float | None:
        """A tensor of one number, exactly; None where there is no such tensor. Raises ConfigError for one of more."""
        entry = self.entries.get(name)
        if entry is None:
            return None
        dtype = DTYPES.get(entry.dtype)
        if entry.num_elements != 1 or dtype is None:
            kinds = ", ".join(DTYPES)
            raise ConfigError(f"tensor {name} must be one number ({kinds}), not {entry.dtype} {list(entry.shape)}")
        return float(torch.frombuffer(bytearray(self.sample(name, entry.num_bytes)), dtype=dtype))

    def num_elements(self, ignored: Iterable[str] = ()) -> int:
        """Numbers in all tensors whose names match none of the patterns."""
        return sum(entry.num_elements for name, entry in self.entries.items() if not matches(name, ignored))


def _weight_files(folder: Path) -> list[Path]:
    """The files of the index if they are there, else model.safetensors, else all safetensors files of the folder.

    Some repositories hold the same weights a second time under other names (consolidated.safetensors).
    """
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(f"{index.name} is not a weight index: {error}") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return [folder / name for name in names]
        if not whole.is_file():
            raise ConfigError(f"{index.name} names files that are missing: {', '.join(missing)}")
        log.warning("%s is stale, it names %s: %s is used", index.name, ", ".join(missing), whole.name)
    if whole.is_file():
        return [whole]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise ConfigError(
                f"{folder.name} holds only pickle weights ({pickles[0]}), which can run any code when read; convert "
                "them once where you trust them: AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
            )
        raise ConfigError(f"{folder} holds no *.safetensors file")
    return files


def _read_header(file: Path) -> dict[str, TensorEntry]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _MAX_HEADER_BYTES):
                raise ValueError(f"header of {length} bytes")
            header: dict[str, Any] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        entries = {}
        for name, value in header.items():
            begin, end = value["data_offsets"]
            entry = TensorEntry(file, value["dtype"], tuple(value["shape"]), 8 + length + begin, end - begin)
            if not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(f"{name} lies outside the file; is the download complete?")
            dtype = DTYPES.get(entry.dtype)
            if dtype is not None and end - begin != entry.num_elements * dtype.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes")
            entries[name] = entry
        return entries
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ConfigError(f"{file.name} is not a valid safetensors file: {error}") from error


class CheckpointWeights(FileWeights):
    """Implements layers' WeightSource over a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        format: WeightFormat,
        ranks: Ranks | None = None,
    ) -> None:
        """ranks: None: this process alone holds the model."""
        sizes = {name: entry.num_bytes for name, entry in checkpoint.entries.items()}
        super().__init__(sizes, dtype, device, ops, format, ranks)
        self._checkpoint = checkpoint
        self._maps: dict[Path, mmap.mmap] = {}

    def read_into(self, name: str, out: Tensor) -> None:
        source = self._view(name, tuple(out.shape))
        rows = max(1, _COPY_BYTES // max(1, source[:1].nbytes))
        for first in range(0, source.shape[0], rows):
            part = source[first : first + rows]
            out[first : first + rows].copy_(part)
            self._give_back(name, part)
            self._advance(part.nbytes)

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        view = self._view(name, shape)
        return view if view.dtype == self.dtype and self.device.type == "cpu" else None

    def _view(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor inside the memory map, in the checkpoint's dtype."""
        entry = self._checkpoint.entries.get(name)
        if entry is None:
            raise ConfigError(f"the weights lack the tensor {name} {list(shape)}")
        if entry.shape != shape:
            raise ConfigError(f"tensor {name} has shape {list(entry.shape)}, config.json asks for {list(shape)}")
        dtype = DTYPES.get(entry.dtype)
        if dtype is None:
            raise ConfigError(f"tensor {name} has type {entry.dtype}; supported: {', '.join(DTYPES)}")
        self._use(name)
        if entry.num_elements == 0:
            return torch.empty(shape, dtype=dtype)
        if entry.begin % dtype.itemsize:
            raise ConfigError(f"tensor {name} is not aligned in {entry.file.name}; write the file anew")
        memory = self._map(entry.file)
        return view_file(memory, dtype, entry.num_elements, entry.begin).view(shape)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            self._maps[file] = map_file(file)
        return self._maps[file]

    def _give_back(self, name: str, part: Tensor) -> None:
        """Drop the part's whole pages from this process's memory; they stay in the system's page cache."""
        entry = self._checkpoint.entries[name]
        memory = self._maps.get(entry.file)
        if memory is None:
            return
        give_back(memory, entry.begin + int(part.storage_offset()) * part.itemsize, part.nbytes)
