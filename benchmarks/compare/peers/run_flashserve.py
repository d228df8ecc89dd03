"""flashserve offline: one LLM, in bfloat16 or with int8 weights."""

from __future__ import annotations

import time
from importlib.metadata import version

from benchmarks.common.protocol import PeerEngine, Run, Workload, serve


class Flashserve(PeerEngine):
    def load(self, work: Workload) -> None:
        from flashserve import LLM

        self.settings = {**work.flashserve_settings(), **work.options}
        self.versions = {"torch": version("torch")}
        self.llm = LLM(work.model, **self.settings)

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        params = {"temperature": 0, "max_tokens": output_tokens, "ignore_eos": True}
        started = time.perf_counter()
        results = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - started
        return Run(seconds, [len(result.token_ids) for result in results], [result.token_ids for result in results])


if __name__ == "__main__":
    serve(Flashserve())
