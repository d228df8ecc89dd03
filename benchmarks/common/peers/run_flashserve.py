"""flashserve's engine in this process, stepped as LLM.generate steps it, with requests that may arrive later."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from benchmarks.common.engine import Watch, load_on_cpu
from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve
from flashserve.engine.core import build_core
from flashserve.protocol import GenerateRequest, SamplingParams


class Flashserve(PeerEngine):
    def load(self, setup: EngineSetup) -> None:
        self.settings = setup.flashserve_settings()
        self.versions = {"torch": version("torch")}
        self.runner = load_on_cpu(Path(setup.model), **self.settings)
        self.resolved = self.runner.resolved

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        count = len(requests)
        watch = Watch(self.runner, self.resolved.block_size, batch)
        core = build_core(replace(self.resolved, max_num_seqs=batch), watch, "benchmark")
        watch.blocks = core.scheduler.blocks
        firsts, ends = [0.0] * count, [0.0] * count
        token_ids: list[list[int]] = [[] for _ in range(count)]
        begun, sent, left = time.perf_counter(), 0, count
        watch.begun = begun
        while left:
            while sent < count and requests.arrivals[sent] <= time.perf_counter() - begun:
                params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=requests.outputs[sent])
                core.handle(GenerateRequest(sent, requests.prompts[sent], params, arrival=time.monotonic()))
                sent += 1
            if not core.has_work:
                time.sleep(max(0.0, requests.arrivals[sent] - (time.perf_counter() - begun)))
                continue
            outputs, now = core.step().outputs, time.perf_counter() - begun
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(output.error.message)
                i = output.request_id
                token_ids[i] += output.token_ids
                firsts[i] = firsts[i] or now
                if output.finish_reason is not None:
                    ends[i] = now
                    watch.ended(i)
                    left -= 1
        starts = [watch.starts[i] for i in range(count)]
        return Run(max(ends), list(map(len, token_ids)), token_ids, starts, firsts, ends, details=watch.figures())


if __name__ == "__main__":
    serve(Flashserve())
