"""Memory on huge pages: with pages of 4 KiB, reading weights and caches waits for the TLB."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_LINE = 64
_CHUNK = 256 << 20  # of addresses; what is not used is never touched


def map_huge(num_bytes: int) -> Tensor:
    """Zeros [num_bytes] uint8 on pages of their own, huge ones where the system has them; untouched until written."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


class Arena:
    """Places many tensors side by side: a tensor of 1 MB on pages of its own would never get one of 2 MiB.

    Memory returns to the system when all tensors of a chunk are gone. Use from one thread.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """Zeros [num_bytes] uint8 that begin on a cache line."""
        if self._used + num_bytes > len(self._chunk):
            self._chunk, self._used = map_huge(max(num_bytes, _CHUNK)), 0
        memory = self._chunk[self._used : self._used + num_bytes]
        self._used += -(-num_bytes // _LINE) * _LINE
        return memory
