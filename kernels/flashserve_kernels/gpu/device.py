"""What a kernel's configuration may depend on: the properties of a GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class GPUProperties:
    """The facts of one GPU that tile sizes and grids follow."""

    name: str
    arch: str
    """``sm_90`` as nvcc writes it, or ``gfx942`` as LLVM does."""
    num_sms: int
    """Streaming multiprocessors, or AMD's compute units."""
    shared_memory_bytes: int
    """What one block may use at most, after opting in."""
    warp_size: int

    @property
    def is_amd(self) -> bool:
        return self.arch.startswith("gfx")

    @property
    def target(self) -> GPUTarget:
        """The compiler's name of it."""
        if self.is_amd:
            return GPUTarget("hip", self.arch, self.warp_size)
        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), self.warp_size)

    @property
    def has_fp8(self) -> bool:
        """Whether the compiler converts e4m3 here: on NVIDIA from compute capability 8.9 on (Ada)."""
        return self.is_amd or int(self.arch.removeprefix("sm_")) >= 89

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel can be brought up while the one before ends: from Hopper on."""
        return not self.is_amd and int(self.arch.removeprefix("sm_")) >= 90

    @property
    def has_bfloat16(self) -> bool:
        """On NVIDIA from compute capability 8.0 on (Ampere)."""
        return self.is_amd or int(self.arch.removeprefix("sm_")) >= 80


T4 = GPUProperties("T4", "sm_75", 40, 64 << 10, 32)
A100 = GPUProperties("A100", "sm_80", 108, 163 << 10, 32)
H100 = GPUProperties("H100", "sm_90", 132, 227 << 10, 32)
H200 = GPUProperties("H200", "sm_90", 132, 227 << 10, 32)
B200 = GPUProperties("B200", "sm_100", 148, 227 << 10, 32)
MI300X = GPUProperties("MI300X", "gfx942", 304, 64 << 10, 64)

PRESETS = (T4, A100, H100, H200, B200, MI300X)

_stand_in = H200  # what a tensor on no GPU is taken to be on


def gpu_properties(device: torch.device) -> GPUProperties:
    """The properties of the tensor's GPU; of the stand-in for tensors of the interpreter and of the meta device."""
    return _read(device) if device.type == "cuda" else _stand_in


@contextmanager
def stand_in(properties: GPUProperties) -> Iterator[None]:
    """Tensors on no GPU are taken to be on this one: for tests, and for compiling ahead of time."""
    global _stand_in
    before, _stand_in = _stand_in, properties
    try:
        yield
    finally:
        _stand_in = before


@functools.cache
def _read(device: torch.device) -> GPUProperties:
    found: Any = torch.cuda.get_device_properties(device)  # torch's own type information lacks a field
    amd = getattr(found, "gcnArchName", "") if torch.version.hip else ""
    # ROCm's LDS has no larger size to opt in to.
    shared = found.shared_memory_per_block if amd else found.shared_memory_per_block_optin
    return GPUProperties(
        name=found.name,
        arch=amd.split(":")[0] or f"sm_{found.major}{found.minor}",
        num_sms=found.multi_processor_count,
        shared_memory_bytes=shared,
        warp_size=found.warp_size,
    )
