"""How much memory of the machine, or of the container, is free; and how a server gives back what it needs no more."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")
# Limit, usage and statistics of control groups, version 2 and then 1, with the name of what can be given back: file
# pages that nobody has used for a while. They count as used, and a limit is reached only once none is left.
GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
# glibc's malloc, for tritonserver and its stubs: what is as large as this comes from the system and goes back there. By
# default each large block that is freed raises that size, up to 32 MB: after 24 requests of 20 and 40 MB tritonserver
# kept 108 MB more than before, with this nothing.
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def free_memory(cgroups: Path = CGROUPS, meminfo: Path = MEMINFO) -> tuple[int, int]:
    """(total, free) bytes of the machine, or of the container's limit where that is less."""
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
    total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    for limit_file, usage_file, stat_file, reclaimable in GROUP_FILES:
        limit, usage = _number(cgroups / limit_file), _number(cgroups / usage_file)
        if limit is not None and usage is not None and limit < total:
            used = usage - _statistic(cgroups / stat_file, reclaimable)
            return limit, min(free, max(0, limit - used))
    return total, free


def _number(file: Path) -> int | None:
    """None for "max", and where there is no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return 0
    return next((int(words[1]) for words in lines if len(words) == 2 and words[0] == name), 0)
