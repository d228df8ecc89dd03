"""OpenVINO GenAI: ContinuousBatchingPipeline."""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve


class OpenVino(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        import openvino
        import openvino_genai

        self.genai: Any = openvino_genai
        self.tensor = openvino.Tensor
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = setup.kv_gib
        scheduler.enable_prefix_caching = False
        scheduler.max_num_seqs = setup.max_requests
        # Above the default of 256: fewer, larger prefill steps.
        scheduler.max_num_batched_tokens = 2048
        capable = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        properties = {
            # One batch at a time over all cores is the LATENCY hint's configuration; THROUGHPUT splits the cores
            # into streams, which one pipeline does not use.
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": setup.threads,
            "INFERENCE_PRECISION_HINT": "bf16" if capable else "f32",
            # The default, 8 bits, is not what the others do.
            "KV_CACHE_PRECISION": "bf16" if capable else "f16",
        }
        self.settings = {**properties, "max_num_batched_tokens": scheduler.max_num_batched_tokens}
        self.versions = {"openvino-genai": version("openvino-genai")}
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(setup.model, scheduler, "CPU", properties)

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        import numpy as np

        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = requests.outputs[0]
        config.ignore_eos = True
        config.do_sample = False
        inputs = [self.tensor(np.array([prompt], dtype=np.int64)) for prompt in requests.prompts]
        started = time.perf_counter()
        results = self.pipeline.generate(inputs, [config] * len(requests))
        seconds = time.perf_counter() - started
        token_ids = [list(map(int, result.m_generation_ids[0])) for result in results]
        return Run(seconds, [len(ids) for ids in token_ids], token_ids)


if __name__ == "__main__":
    serve(OpenVino())
