"""The machine: what it is, what it can do at most, and how fast a model could run on it at best.

    python benchmarks/compare_machine.py BYTES THREADS CACHE      # the ceilings, as JSON

compare.py calls it once a round, as a process of its own: a virtual machine's bandwidth changes from minute to minute.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class ModelCost:
    """What one step must read and compute, whatever the engine."""

    weight_bytes: int
    """Matrices that every step reads, in bfloat16; an input embedding that is not the head is not among them."""
    layer_parameters: int
    head_parameters: int
    kv_bytes_per_token: int
    attention_flops_per_token: int
    """For one query token and one token of context."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> ModelCost:
        """Of a Llama's config.json."""
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * config["intermediate_size"]
        head = hidden * config["vocab_size"]
        return cls(
            weight_bytes=2 * (layers * layer + head),
            layer_parameters=layers * layer,
            head_parameters=head,
            kv_bytes_per_token=2 * 2 * layers * kv_heads * head_dim,
            attention_flops_per_token=4 * layers * heads * head_dim,
        )

    def prefill_s(self, requests: int, prompt: int, ceilings: Ceilings) -> float:
        """The prompts in as few steps as can be: bound by compute, or by one pass over the weights."""
        flops = requests * (
            2 * prompt * self.layer_parameters
            + 2 * self.head_parameters
            + self.attention_flops_per_token * prompt * (prompt + 1) // 2
        )
        return max(flops / (ceilings.gemm_tflop_s * 1e12), self.weight_bytes / (ceilings.read_gb_s * 1e9))

    def decode_s(self, requests: int, context: int, ceilings: Ceilings) -> float:
        """One step of all requests."""
        flops = requests * (
            2 * (self.layer_parameters + self.head_parameters) + self.attention_flops_per_token * context
        )
        read = self.weight_bytes + requests * context * self.kv_bytes_per_token
        return max(flops / (ceilings.gemm_tflop_s * 1e12), read / (ceilings.read_gb_s * 1e9))

    def tokens_per_s(self, requests: int, prompt: int, output: int, ceilings: Ceilings) -> float:
        """Of the whole batch, at the ceilings."""
        steps = (self.decode_s(requests, prompt + i, ceilings) for i in range(1, output))
        return requests * output / (self.prefill_s(requests, prompt, ceilings) + sum(steps))

    def bandwidth_tokens_per_s(self, context: int, ceilings: Ceilings) -> float:
        """Of one request that decodes, were reading all that there is to do."""
        return ceilings.read_gb_s * 1e9 / (self.weight_bytes + context * self.kv_bytes_per_token)


def describe_machine() -> dict[str, Any]:
    """Name, cores, flags that matter to matrix products, memory, kernel."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(reversed([[part.strip() for part in line.split(":", 1)] for line in lines if ":" in line]))
    interesting = (
        *("avx2", "fma", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8"),
        *("asimd", "bf16", "i8mm", "sve", "sve2"),
    )
    flags = (facts.get("flags") or facts.get("Features") or "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": facts.get("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "flags": [flag for flag in interesting if flag in flags],
        "memory_gib": round(pages / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def available_memory() -> int:
    """Bytes that new processes may use."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure_ceilings(weight_bytes: int, threads: int, cache: Path) -> Ceilings:
    """In a process of its own, so that no thread of it is left."""
    command = [sys.executable, __file__, str(weight_bytes), str(threads), str(cache)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CEILINGS_TIMEOUT_S)
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
    return size / _best_of_a_second(data.sum) / 1e9


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
    return 2 * size**3 / _best_of_a_second(lambda: a @ b) / 1e12


def _best_of_a_second(action: Any) -> float:
    best, end = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < end:
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best


def main() -> None:
    size, threads, cache = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    print(json.dumps({"read_gb_s": read_bandwidth(size, threads, cache), "gemm_tflop_s": gemm_tflop_s(threads)}))


if __name__ == "__main__":
    main()
