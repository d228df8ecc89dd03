"""How much of a device's own memory is free, by the allocator that shares it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from flashserve.config import DeviceFacts


class Closable(Protocol):
    """Holds memory until it is closed and forgotten."""

    def close(self) -> None:
        """Free it."""
        ...


class DeviceMemory(Protocol):
    """A device's memory, in bytes. What the allocator has reserved is this process's, used or not."""

    def free(self) -> int:
        """What nobody has reserved."""
        ...

    def reserved(self) -> int:
        """By this process's allocator."""
        ...

    def peak_reserved(self) -> int:
        """The most since :meth:`trim`."""
        ...

    def trim(self) -> None:
        """Wait for the device, give back what is reserved and unused, and begin a new peak."""
        ...


def measure(memory: DeviceMemory, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
    """The facts with what is left beside what ``run_largest`` took at its peak, which it frees when it is closed.

    before: the facts from before anything was loaded. Counted is what the allocator reserved, not what tensors used of
    it: gaps between them and the memory of captured steps serve nobody else. What grew beside it, such as kernels' code
    and captured graphs themselves, stays.
    """
    memory.trim()
    ran = run_largest()
    peak, reserved, free = memory.peak_reserved(), memory.reserved(), memory.free()
    ran.close()
    del ran
    memory.trim()
    beside = max(0, before.free_bytes - free - reserved)
    return replace(before, free_bytes=free + reserved - peak, used_bytes=peak + beside)
