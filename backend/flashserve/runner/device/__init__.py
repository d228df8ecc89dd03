"""The device that a model runs on: everything that differs between a CPU and a GPU, apart from the ops themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from flashserve.config import DeviceFacts, EngineConfig
from flashserve.errors import ConfigError
from flashserve.runner.device.cpu import CpuDevice
from flashserve.runner.device.cuda import CudaDevice
from flashserve.runner.device.memory import Closable
from flashserve.runner.device_queue import DeviceQueue
from flashserve_kernels import Ops

__all__ = ["CpuDevice", "CudaDevice", "Device", "open_device"]


class Device(Protocol):
    """What a runner asks of its device."""

    torch_device: torch.device
    row_lengths: tuple[int, ...]
    """Row lengths to run before the first request, since kernels are compiled for each kind. Empty: none are."""

    def loading(self) -> AbstractContextManager[None]:
        """To be held while a model loads and warms up."""
        ...

    def read_facts(self) -> DeviceFacts:
        """Memory and cores as they are now."""
        ...

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        """The ops that serve a model with heads of so many numbers."""
        ...

    def measure(self, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
        """What is left for the KV cache beside the weights, which are loaded, and what ``run_largest`` returns and took
        until then. before: the facts from before the weights were loaded."""
        ...

    def make_queue(self) -> DeviceQueue:
        """A queue of steps of its own."""
        ...

    def synchronize(self) -> None:
        """Wait until all that was queued is done."""
        ...

    def release(self) -> None:
        """Give unused memory back to the device's other users."""
        ...


def open_device(name: str) -> Device:
    """The device ``auto``, ``cpu``, ``cuda`` or ``cuda:N``. Raises ConfigError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return CpuDevice()
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise ConfigError(f"device {name!r} is not there: torch sees {count} CUDA devices")
    return CudaDevice(int(index or 0))
