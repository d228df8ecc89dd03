"""What the machine offers: memory, cores, and the name of the device."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from flashserve.config import DeviceFacts
from flashserve.errors import ConfigError


def read_device_facts(device: str) -> DeviceFacts:
    """Facts of ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError where it is not there."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = available_cores()
    if device == "cpu":
        total, free = _memory()
        return DeviceFacts("cpu", f"CPU with {threads} cores", total, free, threads)
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {device!r} is not there: torch sees {count} CUDA devices")
    free, total = torch.cuda.mem_get_info(int(index or 0))
    name = torch.cuda.get_device_name(int(index or 0))
    return DeviceFacts("cuda", f"{name} ({kind}:{int(index or 0)})", total, free, threads)


def torch_device(config_device: str, facts: DeviceFacts) -> torch.device:
    """The device that the facts describe."""
    if facts.kind == "cpu":
        return torch.device("cpu")
    return torch.device(config_device if ":" in config_device else f"{facts.kind}:0")


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


def _memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(total, free) bytes of the machine, or of the container's limit where that is less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        limit, usage = _words(root / limit_file), _words(root / usage_file)
        if limit and usage and limit[0] != "max" and int(limit[0]) < total:
            return int(limit[0]), min(free, max(0, int(limit[0]) - int(usage[0])))
    return total, free


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
