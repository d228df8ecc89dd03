"""Under which keys Triton's JIT looks kernels up when an engine starts, and when they are compiled ahead of it: JSON.

A process of its own, because one that interprets kernels has none that compile: python launch_keys.py FOLDER...
Nothing is compiled or launched; the engine's tensors lie on the CPU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor

from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.runner.ahead import start_variants
from flashserve.runner.device import CpuDevice
from flashserve.runner.device.cuda import CudaDevice
from flashserve.runner.loading import load_runner
from flashserve_kernels import kv_cache
from flashserve_kernels.gpu.device import H200, stand_in
from flashserve_kernels.gpu.ops import TritonOps
from flashserve_kernels.gpu.warm import compile_only, compile_variant
from flashserve_kernels.kv_cache import KVCacheSpec, KVLayer

SETTINGS = {"num_threads": 1, "max_num_seqs": 6, "max_num_batched_tokens": 128, "max_model_len": 256}


class StartedOps(TritonOps):
    """The KV cache has the layout of a GPU, where all layers of a block lie together."""

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> Sequence[KVLayer]:
        layout = kv_cache.allocate_kv_cache(spec, num_blocks, torch.device("meta"))
        memory = torch.zeros(num_blocks * kv_cache.block_bytes(spec), dtype=torch.uint8).view(spec.cache_dtype)

        def place(view: Tensor) -> Tensor:
            return memory.as_strided(view.shape, view.stride(), view.storage_offset())

        return [KVLayer(place(layer.k), place(layer.v)) for layer in layout]


class StartedDevice(CpuDevice):
    """Runs the lengths that a GPU's start does."""

    row_lengths = CudaDevice.row_lengths

    def select_ops(self, config: EngineConfig, head_dim: int) -> StartedOps:
        return StartedOps(self.torch_device)


@contextmanager
def keys_of(found: set[str]):
    """Inside, each kernel that the JIT does not have yet leaves its key instead of being compiled."""

    def keep(*, fn: Any, key: str, **_: Any) -> bool:
        found.add(f"{fn.module}.{fn.name} {key}")
        return True

    before, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, keep
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def main() -> None:
    compile_only(H200)
    answers = []
    for folder in sys.argv[1:]:
        launched: set[str] = set()
        warmed: set[str] = set()
        config = EngineConfig(folder, device="cpu", kv_cache_memory_bytes=1 << 20, **SETTINGS)
        with stand_in(H200), keys_of(launched):
            load_runner(open_model(config), config, StartedDevice())
        ahead = EngineConfig(folder, device="cuda", **SETTINGS)
        with keys_of(warmed):
            for variant in dict.fromkeys(start_variants(open_model(ahead), ahead, H200)):
                compile_variant(variant)
        answers.append({"launched": sorted(launched), "warmed": sorted(warmed)})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
