"""The one timer, and the ceilings of a device that rates are compared with."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FLUSH_BYTES = 1 << 30  # an H200's L2 has 60 MB; writing this much takes 0.25 ms there, some ten launches
MIN_REPEATS, MAX_REPEATS = 5, 100
REST_S = 0.02  # OpenMP's threads spin for some milliseconds after their work, on cores that others' threads need


def wall_seconds(call: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Timer:
    """Seconds of a call: on a GPU the median by CUDA events, on a CPU the best, which neighbours disturb least."""

    def __init__(self, device: torch.device, seconds: float = 0.15, least: int = MIN_REPEATS) -> None:
        """seconds: about what one figure may take; least: calls of which it is, however long they take."""
        self.device = device
        self._seconds, self._least = seconds, least
        if device.type == "cuda":
            import torch

            size = min(FLUSH_BYTES, torch.cuda.get_device_properties(device).total_memory // 32)
            self._flushed = torch.zeros(size, dtype=torch.uint8, device=device)

    def seconds(self, *calls: Callable[[], object]) -> list[float]:
        """Of each call; on a CPU they take turns, after a rest and a call that wakes their threads up."""
        if self.device.type == "cuda":
            return [self._median(call) for call in calls]
        best, end, rounds = [float("inf")] * len(calls), time.perf_counter() + self._seconds * len(calls), 0
        while rounds < self._least or time.perf_counter() < end:
            rounds += 1
            for index, call in enumerate(calls):
                time.sleep(REST_S)
                call()
                best[index] = min(best[index], wall_seconds(call))
        return best

    def _median(self, call: Callable[[], object]) -> float:
        """Nothing that the call reads is in a cache when it starts. The write that sees to it takes long enough for the
        call's launches to be queued behind it, so that they do not count."""
        for _ in range(3):
            call()
        first = self._event_times(call, 1)[0]
        repeats = max(self._least, min(MAX_REPEATS, int(self._seconds / max(first, 1e-6))))
        return statistics.median(self._event_times(call, repeats))

    def _event_times(self, call: Callable[[], object], repeats: int) -> list[float]:
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


def read_bandwidth(timer: Timer, num_bytes: int) -> float:
    """Bytes per second of a dot product: two streams that are read, and next to nothing else."""
    import torch

    first, second = torch.ones(2, num_bytes // 8, device=timer.device)
    return num_bytes / timer.seconds(lambda: first.dot(second))[0]


def copy_bandwidth(timer: Timer, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy on the device."""
    import torch

    source = torch.empty(num_bytes, dtype=torch.uint8, device=timer.device).fill_(1)
    target = torch.empty_like(source)
    return 2 * num_bytes / timer.seconds(lambda: target.copy_(source))[0]


def gemm_rate(timer: Timer, size: int, dtype: torch.dtype) -> float:
    """FLOP per second of a square product of random numbers (zeros would take less power, and so run faster)."""
    import torch

    a, b = (torch.randn(size, size, device=timer.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / timer.seconds(lambda: torch.mm(a, b, out=out))[0]


def device_facts(device: torch.device) -> dict[str, Any]:
    """What a report says about the device and the libraries."""
    import torch

    facts: dict[str, Any] = {"torch": torch.__version__, "triton": None, "device": "cpu"}
    with contextlib.suppress(ImportError):
        import triton

        facts["triton"] = triton.__version__
    if device.type == "cuda":
        found: Any = torch.cuda.get_device_properties(device)
        facts |= {
            "device": found.name,
            "sms": found.multi_processor_count,
            "memory_gb": found.total_memory / 1e9,
            "cuda": torch.version.cuda or torch.version.hip,
        }
    return facts
