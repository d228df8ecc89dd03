"""The environment that vLLM's documentation recommends for its CPU build; inherited by the processes it spawns."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def set_environment(threads: int, kv_gib: int) -> dict[str, str]:
    """Set it, before vllm is imported; returns what matters for speed.

    vLLM itself preloads the tcmalloc it bundles, and sets KMP_BLOCKTIME and the affinity of OpenMP's threads.
    """
    cores = sorted(os.sched_getaffinity(0))[:threads]
    variables = {
        # "auto" would leave a core to the scheduler, half of the machine where there are two.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": str(kv_gib),
    }
    openmp = Path(sys.prefix, "lib", "libiomp5.so")
    if openmp.exists():
        variables["LD_PRELOAD"] = str(openmp)
    os.environ |= variables | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    return variables | {"LD_PRELOAD": openmp.name if openmp.exists() else "none"}
