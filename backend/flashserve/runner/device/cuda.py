"""A CUDA GPU."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from flashserve.config import DeviceFacts, EngineConfig
from flashserve.runner.device.cpu import available_cores
from flashserve.runner.device.memory import Closable, measure
from flashserve.runner.device_queue import CudaQueue
from flashserve_kernels import Ops, select_ops

LOCK_POLL_S = 0.2
_ROW_LENGTHS = (*range(1, 10), 16, 17, 32, 33, 64, 65, 128)
"""On both sides of every bound by which attention's tiles are chosen."""


class CudaDevice:
    """Implements Device."""

    row_lengths = _ROW_LENGTHS

    def __init__(self, index: int) -> None:
        self.torch_device = torch.device("cuda", index)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """One engine at a time loads on a GPU of this machine: each measures the free memory to size its KV cache."""
        from flashserve_kernels.gpu.launch import mark_warm, unmark_warm

        torch.cuda.set_device(self.torch_device)  # on which Triton starts kernels, wherever their tensors are
        path = Path(tempfile.gettempdir()) / f"flashserve-{os.getuid()}-cuda{self.torch_device.index}.lock"
        with path.open("w") as file:
            while True:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(LOCK_POLL_S)  # and not in the system: one that does not run at all counts as stopped
            unmark_warm()
            try:
                yield
            finally:  # also where a model does not load: others of this process serve
                mark_warm()

    def read_facts(self) -> DeviceFacts:
        free, total = CudaMemory(self.torch_device).free(), torch.cuda.mem_get_info(self.torch_device)[1]
        name = f"{torch.cuda.get_device_name(self.torch_device)} ({self.torch_device})"
        has_bfloat16 = torch.cuda.get_device_capability(self.torch_device) >= (8, 0)
        return DeviceFacts("cuda", name, total, free, supports_bfloat16=has_bfloat16)

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        num_threads = config.num_threads or available_cores()
        return select_ops(self.torch_device, num_threads, head_dim, batch_invariant=config.batch_invariant)

    def measure(self, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
        return measure(CudaMemory(self.torch_device), before, run_largest)

    def make_queue(self) -> CudaQueue:
        return CudaQueue(self.torch_device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def release(self) -> None:
        torch.cuda.empty_cache()


class CudaMemory:
    """Implements DeviceMemory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]

    def reserved(self) -> int:
        return torch.cuda.memory_reserved(self._device)

    def peak_reserved(self) -> int:
        return torch.cuda.max_memory_reserved(self._device)

    def trim(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
