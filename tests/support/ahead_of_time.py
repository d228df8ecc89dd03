"""Every kernel of representative models, compiled for GPUs that are not here:
``python tests/support/ahead_of_time.py``.

A program of its own, because a process that interprets kernels has none that compile. Prints a JSON list with one
entry per variant and GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashserve_kernels.gpu import (
    activation,
    attention,
    block_copy,
    embedding,
    few_rows,
    grouped,
    invariant_linear,
    logprobs,
    noise,
    norm,
    penalties,
    rope_cache,
    sampling,
    token_mask,
)
from flashserve_kernels.gpu.device import A100, B200, H200, MI300X, GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant
from flashserve_kernels.grouped import GroupedFormat

MODULES = (
    activation, block_copy, embedding, few_rows, grouped, invariant_linear, logprobs, noise, norm, penalties,
    rope_cache, sampling, token_mask,
)  # fmt: skip
PRODUCTS = ("attention", "few_rows", "grouped_linear", "invariant_linear")
WORKERS = 2


@dataclass(frozen=True)
class Case:
    """A model and the GPUs that its kernels are compiled for."""

    name: str
    shape: ModelShape
    gpus: tuple[GPUProperties, ...] = (H200, A100, B200, MI300X)
    windows: tuple[int | None, ...] = (None,)
    softcap: float | None = None

    def variants(self, properties: GPUProperties) -> Iterator[Variant]:
        for module in MODULES:
            yield from module.variants(properties, self.shape)
        for batch_invariant in (False, True):
            yield from attention.variants(properties, self.shape, self.windows, self.softcap, batch_invariant)


Q4_1 = GroupedFormat(4, 32, "float16", None)
Q8_0 = GroupedFormat(8, 32, "float16", 128)
Q4_K = GroupedFormat(4, 32, "float24", None)
Q6_K = GroupedFormat(8, 16, "float24", 32)

E4M3, HALF, FULL = torch.float8_e4m3fn, torch.float16, torch.float32

GEMMA = ModelShape(
    2304, 8, 4, 256, 9216, 256000, 26,
    block_size=64, activation="gelu_tanh", caps_logits=True, embedding_scale=48.0, norm_dtype=FULL,
)  # fmt: skip

CASES = (
    Case("Qwen3-8B", ModelShape(4096, 32, 8, 128, 12288, 151936, 36)),
    Case("Qwen3-8B, FP8 cache", ModelShape(4096, 32, 8, 128, 12288, 151936, 36, cache_dtype=E4M3)),
    Case("Qwen3-8B in Q4_K_M", ModelShape(4096, 32, 8, 128, 12288, 151936, 36, weight_formats=(Q4_K, Q6_K))),
    # Small heads and odd widths: where the two makers' compilers differ, not each of their GPUs.
    Case("SmolLM2-135M", ModelShape(576, 9, 3, 64, 1536, 49152, 30), (H200, MI300X)),
    # Heads that are no power of two, full multi-head attention, float16.
    Case("Phi-2", ModelShape(2560, 32, 32, 80, 10240, 51200, 32, HALF, HALF, 16, "gelu_tanh", False), (A100,)),
    # Windows in every other layer, soft caps, the largest heads, large blocks, scaled embeddings, norms in float32.
    Case("Gemma-2-2B", GEMMA, (H200,), (None, 4096), 50.0),
    Case("Gemma-2-2B with the other GELU", replace(GEMMA, activation="gelu"), (H200,), (None, 4096), 50.0),
    Case(
        "SmolLM2-135M in float32, and Q4_1",
        ModelShape(576, 9, 3, 64, 1536, 49152, 30, FULL, FULL, weight_formats=(Q4_1, Q8_0)),
        (H200,),
    ),
)  # fmt: skip


def plan() -> list[tuple[str, GPUProperties, Variant]]:
    """Model, GPU and variant; each variant once per GPU."""
    found: dict[tuple[str, str], tuple[str, GPUProperties, Variant]] = {}
    for case in CASES:
        makers: set[bool] = set()
        for properties in case.gpus:
            for variant in case.variants(properties):
                # Without a matrix product a maker's GPUs get nearly the same code: the first of them stands for all.
                if any(kind in variant.name for kind in PRODUCTS) or properties.is_amd not in makers:
                    found.setdefault((properties.arch, repr(variant)), (case.name, properties, variant))
            makers.add(properties.is_amd)
    # The slow ones first, so that no worker ends with one of them.
    return sorted(found.values(), key=lambda entry: "attention" not in entry[2].name)


_plan: list[tuple[str, GPUProperties, Variant]] = []


def compile_one(index: int) -> dict[str, Any]:
    if not _plan:
        _plan.extend(plan())
    model, properties, variant = _plan[index]
    result: dict[str, Any] = {"model": model, "arch": properties.arch, "variant": repr(variant), "error": None}
    start = os.times()
    try:
        compiled = variant.compile(properties)
    except Exception as error:  # whatever the compiler raises is this variant's result
        return result | {"error": f"{type(error).__name__}: {error}"}
    return result | {
        "cpu_seconds": sum(now - then for now, then in zip(os.times()[:4], start[:4], strict=True)),
        "shared": compiled.metadata.shared,
        "binary": len(compiled.asm["hsaco" if properties.is_amd else "cubin"]),
        "spilled": None if properties.is_amd else spilled_bytes(compiled),
    }


def spilled_bytes(compiled: Any) -> int:
    """Bytes per thread that ptxas moves between registers and memory because it ran out of registers."""
    from triton import knobs
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        usage = run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)).stdout
        stacks = re.findall(r"STACK:(\d+)", usage)
        assert stacks, f"cuobjdump said nothing about the stack: {usage}"
        if not any(int(count) for count in stacks):
            return 0  # spilled registers would lie there
        ptx.write_text(compiled.asm["ptx"])
        arch = re.search(r"^\.target (sm_\w+)", compiled.asm["ptx"], re.MULTILINE)
        assert arch is not None
        ptxas = get_ptxas(compiled.metadata.target.arch).path
        log = run(ptxas, "-v", f"--gpu-name={arch[1]}", str(ptx), "-o", str(cubin)).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    assert spills, f"ptxas said nothing about spills: {log}"
    return sum(int(count) for count in spills)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True)


def main() -> None:
    # Spawned: torch's threads do not survive a fork.
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        json.dump(list(pool.map(compile_one, range(len(plan())))), sys.stdout)


if __name__ == "__main__":
    main()
