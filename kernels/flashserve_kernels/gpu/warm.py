"""Compiles kernels before anything is launched, in several processes, into Triton's cache.

An engine's first start compiles its kernels one after the other as it launches them, about a minute; later ones find
them in ``TRITON_CACHE_DIR``. What is compiled here goes through the same lookup (``kernel.warmup``), so that a launch
finds it; :meth:`Variant.compile` would not do, whose types and attributes Triton writes down otherwise. No GPU is
touched: a cache can be filled where an image is built.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget

from flashserve_kernels.gpu.dependent import launch_options
from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import OPTIONS, TYPES, Variant

_DTYPES = {name: dtype for dtype, name in TYPES.items()}
_ALIGNED, _ODD = 16, 3  # any numbers that are and are not divisible by 16; neither is 1, which would be a constant
_LARGE = 1 << 32


@dataclass(frozen=True)
class Warmed:
    """What became of one variant."""

    variant: Variant
    seconds: float
    error: str | None = None


class _NoGPU:
    """Triton's driver as far as a compilation asks it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(properties: GPUProperties) -> None:
    """From now on Triton takes this for the GPU of this process, in which nothing can be launched any more."""
    from triton.runtime import driver

    driver.set_active(_NoGPU(properties.target))


@dataclass(frozen=True)
class _Pointer:
    """Stands in for a tensor."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address

    def ptr_range(self) -> int:
        return 0  # AMD: below 2 GB, as all but a cache and a vocabulary's table are


def stand_ins(variant: Variant) -> list[Any]:
    """Arguments in the kernel's order that Triton specialises as those of the launch; constants are not among them."""
    kinds = {name: (kind, aligned) for name, kind, aligned in variant.arguments}
    constants = dict(variant.constants)
    return [_stand_in(*kinds[name]) if name in kinds else constants[name] for name in variant.kernel.arg_names]


def _stand_in(kind: str, aligned: bool) -> Any:
    number = _ALIGNED if aligned else _ODD
    if kind.startswith("*"):
        return _Pointer(_DTYPES[kind[1:]], number)
    values: dict[str, Any] = {"fp32": 0.5, "u1": True, "i32": number, "i64": _LARGE + number}
    return values[kind]


def compile_variant(variant: Variant) -> Any:
    """Triton's CompiledKernel for the current GPU, from its cache where it is there."""
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **OPTIONS}
    options |= launch_options(dict(variant.constants))
    return variant.kernel.warmup(*stand_ins(variant), grid=(1,), **options)


def warm(properties: GPUProperties, variants: Iterable[Variant], num_processes: int | None = None) -> Iterator[Warmed]:
    """Compile them for such a GPU, each once, and say of each when it is done. A failure is that variant's own.

    num_processes: None: one per core that this process may use.
    """
    # The slow ones first, so that no process ends with one of them.
    ordered = sorted(dict.fromkeys(variants), key=lambda variant: "attention" not in variant.name)
    if not ordered:
        return
    workers = min(len(ordered), num_processes or len(os.sched_getaffinity(0)))
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, compile_only, (properties,)) as pool:
        # A kernel is found again by its name: Triton's objects do not travel.
        jobs = {pool.submit(_compile_named, replace(each, kernel=None)): each for each in ordered}
        for job in as_completed(jobs):
            seconds, error = job.result()
            yield Warmed(jobs[job], seconds, error)


def _compile_named(variant: Variant) -> tuple[float, str | None]:
    module, _, function = variant.name.rpartition(".")
    kernel = getattr(importlib.import_module(module), function)
    started = time.perf_counter()
    try:
        compile_variant(replace(variant, kernel=kernel))
    except Exception as error:  # whatever the compiler raises is this variant's result
        return time.perf_counter() - started, f"{type(error).__name__}: {error}"
    return time.perf_counter() - started, None
