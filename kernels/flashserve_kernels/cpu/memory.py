"""Memory on huge pages: with pages of 4 KiB, reading weights and caches waits for the TLB."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

_LINE = 64
_CHUNK = 256 << 20  # of addresses; what is not used is never touched


def map_huge(num_bytes: int) -> Tensor:
    """Zeros [num_bytes] uint8 on pages of their own, huge ones where the system has them; untouched until written."""
    return torch.frombuffer(_map(num_bytes), dtype=torch.uint8)


def _map(num_bytes: int) -> mmap.mmap:
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel built without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


class Arena:
    """Places many tensors side by side: a tensor of 1 MB on pages of its own would never get one of 2 MiB.

    Memory returns to the system when all tensors of a chunk are gone. Use from one thread.
    """

    def __init__(self) -> None:
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None  # a weak reference: tensors alone keep it
        self._used = 0

    def allocate(self, num_bytes: int) -> Tensor:
        """Zeros [num_bytes] uint8 that begin on a cache line."""
        chunk = self._chunk()
        if chunk is None or self._used + num_bytes > len(chunk):
            chunk, self._used = _map(max(num_bytes, _CHUNK)), 0
            self._chunk = weakref.ref(chunk)
        memory = torch.frombuffer(chunk, dtype=torch.uint8, count=num_bytes, offset=self._used)
        self._used += -(-num_bytes // _LINE) * _LINE
        return memory
