"""What weight sources over memory-mapped files share: scratch memory, progress, and what was not asked for."""

from __future__ import annotations

import fnmatch
import math
import mmap
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.layers.parallel import Ranks
from flashserve.layers.weight_format import WeightFormat
from flashserve.models.progress import LoadingProgress
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


def give_back(memory: mmap.mmap, begin: int, num_bytes: int) -> None:
    """Drop the whole pages of a part of a file from this process's memory; they stay in the system's page cache."""
    first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (begin + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        memory.madvise(mmap.MADV_DONTNEED, first, length)
