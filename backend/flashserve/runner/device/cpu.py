"""The machine's own processor: its cores and its memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from flashserve.config import DeviceFacts, EngineConfig
from flashserve.memory import free_memory
from flashserve.runner.device.memory import Closable
from flashserve.runner.device_queue import CpuQueue, DeviceQueue
from flashserve_kernels import Ops, select_ops


class CpuDevice:
    """Implements Device. Work is done when a call returns."""

    row_lengths: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read_facts(self) -> DeviceFacts:
        total, free = free_memory()
        return DeviceFacts("cpu", f"CPU with {available_cores()} cores", total, free, computes_on_cpu=True)

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        num_threads = config.num_threads or available_cores()
        torch.set_num_threads(num_threads)
        cpus = sorted(os.sched_getaffinity(0))[:num_threads] if config.pin_threads else None
        return select_ops(self.torch_device, num_threads, head_dim, cpus, batch_invariant=config.batch_invariant)

    def measure(self, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
        return before  # pages cost nothing before they are touched: a share of the free memory is what is left

    def make_queue(self) -> DeviceQueue:
        return CpuQueue()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def release(self) -> None:
        """Freed memory went back when it was freed."""


def available_cores() -> int:
    """Cores this process may use: its affinity, or the control group's quota where that is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cpu_quota()
    return max(1, min(cores, int(quota))) if quota is not None else cores


def _cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU time per second that a container may use, or None. Version 2 of control groups, then version 1."""
    limit = _words(root / "cpu.max")
    if len(limit) == 2:
        return None if limit[0] == "max" else int(limit[0]) / int(limit[1])
    quota, period = _words(root / "cpu/cpu.cfs_quota_us"), _words(root / "cpu/cpu.cfs_period_us")
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
