"""What a model's start would compile on a GPU that is not here: the start itself, on tensors without memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor

from flashserve.config import DeviceFacts, EngineConfig
from flashserve.errors import ConfigError
from flashserve.models.files import ModelFiles
from flashserve.runner.device.cuda import CudaDevice
from flashserve.runner.device.memory import Closable
from flashserve.runner.device_queue import CpuQueue, Download
from flashserve.runner.loading import load_runner
from flashserve_kernels import Ops
from flashserve_kernels.gpu.device import PRESETS, GPUProperties, gpu_properties
from flashserve_kernels.gpu.launch import Variant, record
from flashserve_kernels.select import triton_ops

MEMORY_BYTES = 1 << 40  # more than any model: nothing is allocated


def start_variants(files: ModelFiles, config: EngineConfig, properties: GPUProperties) -> list[Variant]:
    """Every variant of a kernel that an engine with these settings starts before its first request, which are all that
    it ever starts. What is read of the weights goes nowhere. Raises ConfigError as the start would."""
    return record(properties, lambda: load_runner(files, config, AheadDevice(properties)))


def find_gpu(name: str | None) -> GPUProperties:
    """One of the GPUs whose properties are known, by its name, or the one of this machine. Raises ConfigError."""
    if name is None:
        if not torch.cuda.is_available():
            raise ConfigError("there is no GPU here; name one to compile for, such as H200")
        return gpu_properties(torch.device("cuda", torch.cuda.current_device()))
    found = next((preset for preset in PRESETS if preset.name.lower() == name.lower()), None)
    if found is None:
        raise ConfigError(f"gpu must be one of {', '.join(preset.name for preset in PRESETS)}, not {name!r}")
    return found


class AheadDevice:
    """Implements Device on torch's meta device: shapes and types alone."""

    row_lengths = CudaDevice.row_lengths

    def __init__(self, properties: GPUProperties) -> None:
        self.torch_device = torch.device("meta")
        self._properties = properties

    def loading(self) -> AbstractContextManager[None]:
        return nullcontext()

    def read_facts(self) -> DeviceFacts:
        has_bfloat16 = self._properties.has_bfloat16
        return DeviceFacts("cuda", self._properties.name, MEMORY_BYTES, MEMORY_BYTES, supports_bfloat16=has_bfloat16)

    def select_ops(self, config: EngineConfig, head_dim: int) -> Ops:
        return triton_ops(self.torch_device, config.batch_invariant)

    def measure(self, before: DeviceFacts, run_largest: Callable[[], Closable]) -> DeviceFacts:
        run_largest().close()
        return before

    def make_queue(self) -> AheadQueue:
        return AheadQueue()

    def synchronize(self) -> None:
        """Nothing is under way."""

    def release(self) -> None:
        """Nothing was taken."""


class AheadQueue(CpuQueue):
    """Steps are captured as on a GPU: what they launch is recorded each time."""

    run_ahead = True

    def to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to("meta")

    def download(self, tensor: Tensor) -> Download:
        return super().download(torch.zeros(tensor.shape, dtype=tensor.dtype))

    def capture(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        return lambda: None, function()
