"""The one timer, and the ceilings of a device that rates are compared with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLUSH_BYTES = 1 << 30  # an H200's L2 has 60 MB; writing this much takes 0.25 ms there, some ten launches
MIN_REPEATS, MAX_REPEATS = 5, 100


def wall_seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def best_seconds(call: Callable[[], object], for_s: float = 1.0) -> float:
    """The shortest of the calls that fit into that time: what a machine can do, where neighbours only slow it down."""
    best, end = float("inf"), time.perf_counter() + for_s
    while time.perf_counter() < end:
        best = min(best, wall_seconds(call))
    return best


class Timer:
    """Median seconds of a call: CUDA events on a GPU, wall time on a CPU."""

    def __init__(self, device: torch.device, seconds: float = 0.15) -> None:
        """seconds: about what one figure may take."""
        self.device = device
        self._seconds = seconds
        if device.type == "cuda":
            import torch

            size = min(FLUSH_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)
            self._flushed = torch.zeros(size, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], object]) -> float:
        """The median. On a GPU nothing that the call reads is in a cache when it starts. The write that sees to it
        takes long enough for the call's launches to be queued behind it, so that they do not count."""
        for _ in range(3):
            call()
        first = self._times(call, 1)[0]
        repeats = max(MIN_REPEATS, min(MAX_REPEATS, int(self._seconds / max(first, 1e-6))))
        return statistics.median(self._times(call, repeats))

    def _times(self, call: Callable[[], object], repeats: int) -> list[float]:
        if self.device.type != "cuda":
            return [wall_seconds(call) for _ in range(repeats)]
        import torch

        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)


def copy_bandwidth(timer: Timer, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, device=timer.device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer.seconds(lambda: target.copy_(source))


def gemm_rate(timer: Timer, size: int, dtype: torch.dtype) -> float:
    """FLOP per second of a square product of random numbers (zeros would take less power, and so run faster)."""
    import torch

    a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timer.seconds(lambda: torch.mm(a, b, out=out))


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a report says about the device and the libraries."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "device": "cpu"}
    try:
        import triton

        facts["triton"] = triton.__version__
    except ImportError:
        facts["triton"] = None
    if device.type == "cuda":
        found: Any = torch.cuda.get_device_properties(device)
        facts |= {
            "device": found.name,
            "sms": found.multi_processor_count,
            "memory_gb": found.total_memory / 1e9,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return facts
