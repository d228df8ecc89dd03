"""What the machine offers: memory, cores, and the name of the device."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from flashserve.config import DeviceFacts
from flashserve.errors import ConfigError
from flashserve.memory import free_memory

LOCK_POLL_S = 0.2


def read_device_facts(device: str) -> DeviceFacts:
    """Facts of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = available_cores()
    if device == "cpu":
        total, free = free_memory()
        return DeviceFacts("cpu", f"CPU with {threads} cores", total, free, threads, computes_on_cpu=True)
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device!r} is not there: torch sees {count} CUDA devices")
    free, total = torch.cuda.mem_get_info(int(index or 0))
    name = torch.cuda.get_device_name(int(index or 0))
    has_bfloat16 = torch.cuda.get_device_capability(int(index or 0)) >= (8, 0)
    return DeviceFacts(
        "cuda", f"{name} ({kind}:{int(index or 0)})", total, free, threads, supports_bfloat16=has_bfloat16
    )


def torch_device(config_device: str, facts: DeviceFacts) -> torch.device:
    """The device that the facts describe."""
    if facts.kind == "cpu":
        return torch.device("cpu")
    return torch.device(config_device if ":" in config_device else f"{facts.kind}:0")


@contextmanager
def loading_lock(device: torch.device) -> Iterator[None]:
    """One engine at a time loads on a GPU of this machine: each measures the free memory to size its KV cache."""
    if device.type == "cpu":
        yield
        return
    path = Path(tempfile.gettempdir()) / f"flashserve-{os.getuid()}-{device.type}{device.index or 0}.lock"
    with path.open("w") as file:
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(LOCK_POLL_S)  # and not in the system: one that does not run at all counts as stopped
        yield


def measure_gpu_memory(facts: DeviceFacts, device: torch.device, run_largest_step: Callable[[], None]) -> DeviceFacts:
    """What is left once the weights, which are loaded, and the largest step's activations have their room.

    facts: as they were before the weights were loaded.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    run_largest_step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    beside_torch = max(0, facts.free_bytes - free - reserved)  # kernels' code, cuBLAS' workspaces
    return replace(facts, free_bytes=free + reserved - peak, used_bytes=peak + beside_torch)


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
