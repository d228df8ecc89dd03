"""A CPU machine: what it is, and what it can do at most.

    python -m benchmarks.common.machine BYTES THREADS CACHE      # the ceilings, as JSON

Comparisons call it once a round, as a process of its own: a virtual machine's bandwidth changes from minute to minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.results import ROOT
from benchmarks.common.timing import best_seconds

CEILINGS_TIMEOUT_S = 120.0

READ_C = r"""
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
typedef uint64_t v8 __attribute__((vector_size(64)));
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
volatile uint64_t sink[1024];
int main(int count, char **arguments) {
  size_t bytes = strtoull(arguments[1], 0, 10) / (1 << 20) * (1 << 20), threads = strtoull(arguments[2], 0, 10);
  char *data;
  if (count != 3 || !bytes || posix_memalign((void **)&data, 2 << 20, bytes)) return 1;
  madvise(data, bytes, MADV_HUGEPAGE);
  memset(data, 1, bytes);
  double best = 1e9, end = now() + 1.0;
  while (now() < end) {
    double start = now();
    #pragma omp parallel num_threads(threads)
    {
      size_t me = omp_get_thread_num(), part = bytes / threads / 256 * 256;
      const v8 *p = (const v8 *)(data + me * part);
      v8 a = {0}, b = {0}, c = {0}, d = {0};
      for (size_t i = 0; i < part / 64; i += 4) { a += p[i]; b += p[i + 1]; c += p[i + 2]; d += p[i + 3]; }
      a += b + c + d;
      sink[me * 8 % 1024] = a[0] + a[1] + a[2] + a[3] + a[4] + a[5] + a[6] + a[7];
    }
    double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  printf("%f\n", bytes / best / 1e9);
}
"""


@dataclass(frozen=True)
class Ceilings:
    """The best of one second each."""

    read_gb_s: float
    """All cores reading as many bytes as the model's weights, again and again."""
    gemm_tflop_s: float
    """bfloat16, 2048 x 2048 x 2048, torch."""

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


def available_memory() -> int:
    """Bytes that new processes may use."""
    return int(psutil.virtual_memory().available)


def measure_ceilings(weight_bytes: int, threads: int, cache: Path) -> Ceilings:
    """In a process of its own, so that no thread of it is left."""
    command = [sys.executable, "-m", "benchmarks.common.machine", str(weight_bytes), str(threads), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CEILINGS_TIMEOUT_S, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"cannot measure the machine's ceilings:\n{done.stderr[-2000:]}")
    return Ceilings(**json.loads(done.stdout))


def read_bandwidth(size: int, threads: int, cache: Path) -> float:
    """GB/s; a small C program where there is a compiler, else torch."""
    program = _reader(cache)
    if program is not None:
        return float(subprocess.run([program, str(size), str(threads)], capture_output=True, check=True).stdout)
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(size // 4, dtype=torch.int32)
    return size / best_seconds(data.sum) / 1e9


def _reader(cache: Path) -> Path | None:
    """The compiled READ_C, or None."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    program = cache / f"read-bandwidth-{hashlib.sha256(READ_C.encode()).hexdigest()[:12]}"
    if program.exists() or compiler is None:
        return program if program.exists() else None
    cache.mkdir(parents=True, exist_ok=True)
    source = program.with_suffix(".c")
    source.write_text(READ_C)
    command = [compiler, "-O3", "-march=native", "-fopenmp", "-o", str(program), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return program if done.returncode == 0 else None


def gemm_tflop_s(threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    size = 2048
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / best_seconds(lambda: a @ b) / 1e12


def main() -> None:
    size, threads, cache = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    print(json.dumps({"read_gb_s": read_bandwidth(size, threads, cache), "gemm_tflop_s": gemm_tflop_s(threads)}))


if __name__ == "__main__":
    main()
