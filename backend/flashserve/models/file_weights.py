"""What weight sources over memory-mapped files share: scratch memory, progress, and what was not asked for."""

from __future__ import annotations

import fnmatch
import math
import mmap
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WeightFormat
from flashserve.models.progress import LoadingProgress
from flashserve.paths import native
from flashserve_kernels import Ops
from flashserve_kernels.grouped import GroupedRows


class FileWeights:
    """Implements layers' WeightSource together with a subclass's ``read_into`` and ``mapped``."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        format: WeightFormat,
        ranks: Ranks | None = None,
    ) -> None:
        """sizes: bytes of each tensor in the files; ranks: None: this process alone holds the model."""
        self.dtype = dtype
        self.device = device
        self.ops = ops
        self.format = format
        self.ranks = ranks or Ranks()
        self._names = sizes.keys()
        self._used: set[str] = set()
        self._scratch = torch.empty(0)
        self._progress = LoadingProgress(sum(sizes.values()))

    def has(self, name: str) -> bool:
        return name in self._names

    def grouped(self, name: str, shape: tuple[int, int]) -> GroupedRows | None:
        return None

    def read_into(self, name: str, out: Tensor) -> None:
        raise NotImplementedError

    def mapped(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        raise NotImplementedError

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.read_into(name, out)
        return out

    def scratch(self, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        if self._scratch.numel() < count:
            self._scratch = torch.empty(0)  # the old one goes first
            self._scratch = torch.empty(count, dtype=self.dtype, device=self.device)
        return self._scratch[:count].view(shape)

    def finish(self, ignored: Iterable[str]) -> None:
        """Nothing more will be read. Raises ConfigError if the files hold tensors that the model did not take."""
        self._progress.close()
        unused = sorted(name for name in self._names if name not in self._used and not matches(name, ignored))
        if unused:
            more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
            raise ConfigError(f"the weights hold tensors that the model does not have: {', '.join(unused[:5])}{more}")

    def _use(self, name: str) -> None:
        self._used.add(name)

    def _advance(self, num_bytes: int) -> None:
        self._progress.advance(num_bytes)


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a tensor's name fits one of the patterns (fnmatch)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def map_file(file: Path) -> mmap.mmap:
    """A file's bytes, to be read only: one that could be written to counts as memory that it may need, and a file of
    more than the machine has could not be opened. Raises OSError, and ValueError for an empty file."""
    with native(file).open("rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


def view_file(memory: mmap.mmap, dtype: torch.dtype, count: int, begin: int) -> Tensor:
    """``count`` numbers from byte ``begin`` of a mapped file. Never write to them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin)


def give_back(memory: mmap.mmap, begin: int, num_bytes: int) -> None:
    """Drop the whole pages of a part of a file from this process's memory; they stay in the system's page cache."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (begin + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        memory.madvise(mmap.MADV_DONTNEED, first, length)
