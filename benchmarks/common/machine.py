"""A CPU machine: what it is, and what it can do at most.

    python -m benchmarks.common.machine BYTES THREADS      # the ceilings, as JSON

Comparisons call it once a round, as a process of its own: a virtual machine's bandwidth changes from minute to minute.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.results import ROOT
from benchmarks.common.timing import Timer, gemm_rate, read_bandwidth

CEILINGS_TIMEOUT_S = 120.0
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Ceilings:
    """The best of one second each."""

    read_gb_s: float
    """All cores reading as many bytes as the model's weights, again and again."""
    gemm_tflop_s: float
    """bfloat16, 2048 x 2048 x 2048, torch."""

    def __str__(self) -> str:
        return f"{self.read_gb_s:.1f} GB/s read, {self.gemm_tflop_s:.2f} TFLOP/s in bfloat16"

    @property
    def rates(self) -> tuple[float, float]:
        """Bytes and FLOP per second, as ModelCost takes them."""
        return self.read_gb_s * 1e9, self.gemm_tflop_s * 1e12


def describe_machine() -> dict[str, Any]:
    """Name, cores, flags that matter to matrix products, memory, kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    interesting = (
        *("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
        *("asimd", "bf16", "i8mm", "sve", "sve2"),
    )
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    return {
        "cpu": facts.get("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in interesting if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def measure_ceilings(weight_bytes: int, threads: int) -> Ceilings:
    """In a process of its own, so that no thread of it is left."""
    return Ceilings(**_measure("ceilings", weight_bytes, threads))


def measure_bandwidth(num_bytes: int, threads: int) -> float:
    """``read_gb_s`` alone: on a CPU without bfloat16 the other ceiling takes minutes."""
    return float(_measure("bandwidth", num_bytes, threads)["read_gb_s"])


def _measure(what: str, num_bytes: int, threads: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.common.machine", what, str(num_bytes), str(threads)]
    # Huge pages, as our weights have.
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=CEILINGS_TIMEOUT_S, cwd=ROOT, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"cannot measure the machine's ceilings:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def read_ceilings(weight_bytes: int) -> Ceilings:
    """In this process, with as many threads as torch has."""
    import torch

    timer = Timer(torch.device("cpu"), seconds=1.0)
    return Ceilings(read_bandwidth(timer, weight_bytes) / 1e9, gemm_rate(timer, GEMM_SIZE, torch.bfloat16) / 1e12)


def main() -> None:
    import torch

    what, num_bytes, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    if what == "ceilings":
        print(json.dumps(asdict(read_ceilings(num_bytes))))
    else:
        read = read_bandwidth(Timer(torch.device("cpu"), seconds=1.0), num_bytes)
        print(json.dumps({"read_gb_s": read / 1e9}))


if __name__ == "__main__":
    main()
