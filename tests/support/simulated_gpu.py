"""A GPU for the runner on a machine without one: a device of little memory of its own, which works late.

Every tensor that torch makes while the device is open counts against its memory; what does not fit raises
torch.OutOfMemoryError, as on a GPU. The allocator reserves in whole pieces of 512 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashserve.config import DeviceFacts, EngineConfig
from flashserve.runner.device.memory import Closable, measure
from flashserve.runner.device_queue import DeviceQueue
from flashserve_kernels import KVCacheSpec, Ops
from flashserve_kernels.kv_cache import KVLayer
from lazy_device import CapturableOps, LazyCpu, LazyQueue

PIECE = 512
STEP_S, TOKEN_S = 2e-3, 1e-4
"""What a step takes on the device's clock: so much, and so much for each of its tokens."""


class SimulatedMemory(TorchDispatchMode):
    """Implements DeviceMemory, over the storages that live."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total
        self.peak = 0
        self.pools: WeakKeyDictionary[SimulatedQueue, int] = WeakKeyDictionary()
        """What the captured steps of a queue share."""
        self.counts = True
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if self.counts and isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._storages and not self._storages[storage._cdata][0].expired():
            return
        self._storages[storage._cdata] = StorageWeakRef(storage), -(-storage.nbytes() // PIECE) * PIECE
        used = self.reserved()
        if used > self.total:
            del self._storages[storage._cdata]
            raise torch.OutOfMemoryError(f"{used} bytes of {self.total}")
        self.peak = max(self.peak, used)

    def free(self) -> int:
        return self.total - self.reserved()

    def reserved(self) -> int:
        self._storages = {key: entry for key, entry in self._storages.items() if not entry[0].expired()}
        return sum(size for _, size in self._storages.values()) + sum(self.pools.values())

    def peak_reserved(self) -> int:
        return self.peak

    def trim(self) -> None:
        self.peak = self.reserved()


class SimulatedQueue(LazyQueue):
    """Captured steps keep their results, and share the memory of everything between."""

    def __init__(self, memory: SimulatedMemory, seed: int) -> None:
        super().__init__(seed)
        self._memory = memory
        memory.pools[self] = 0

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        memory, peak_before = self._memory, self._memory.peak
        memory.trim()
        captured = super().capture(self._counted_once(function))
        transient = memory.peak - memory.reserved()
        memory.pools[self] = max(memory.pools[self], transient)
        memory.peak = max(peak_before, memory.peak, memory.reserved())
        return captured

    def _counted_once(self, function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """The first call captures; a replay uses the pool."""
        calls = iter([True])

        def call() -> Tensor:
            self._memory.counts = next(calls, False)
            try:
                return function()
            finally:
                self._memory.counts = True

        return call


class SimulatedGpu(LazyCpu):
    """Its ops, its facts and its plans are a GPU's; to be used inside :meth:`open`."""

    def __init__(self, total_bytes: int, seed: int = 0) -> None:
        super().__init__(seed)
        self._seed = seed
        self.memory = SimulatedMemory(total_bytes)

    @contextmanager
    def open(self) -> Iterator[SimulatedGpu]:
        """Until the end torch's tensors lie on it."""
        with self.memory:
            yield self

    def read_facts(self) -> DeviceFacts:
        return DeviceFacts("cuda", "simulated GPU", self.memory.total, self.memory.free())

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        torch.set_num_threads(1)
        return SimulatedOps(self)

    def make_queue(self) -> DeviceQueue:
        self.queue = SimulatedQueue(self.memory, self._seed)
        return self.queue

    def measure(self, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
        return measure(self.memory, before, run_largest)


class SimulatedOps(CapturableOps):
    """With a cache that takes its memory at once; a CPU's takes it page by page, unseen by torch."""

    def __init__(self, device: SimulatedGpu) -> None:
        super().__init__(device.torch_device)
        self._gpu = device

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        self._gpu.queue.clock += STEP_S + TOKEN_S * len(token_ids)  # once in each step
        return super().gather_tokens(token_ids, last_tokens, slots)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> Sequence[KVLayer]:
        block = (spec.block_size, spec.num_kv_heads, spec.head_dim)
        cache = torch.zeros((spec.num_layers, 2, num_blocks, *block), dtype=spec.cache_dtype)
        return [KVLayer(layer[0], layer[1]) for layer in cache.unbind(0)]
