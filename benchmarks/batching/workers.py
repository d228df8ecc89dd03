"""The systems that are compared, each a process: python -m benchmarks.batching.workers transformers|flashserve|served

All of them have the same weights in bfloat16 and the same threads, take token ids, decode greedily and give each
request exactly as many tokens as it asks for.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.batching.workload import Workload as Requests
from benchmarks.common.protocol import PeerEngine, Run, Workload, serve
from benchmarks.common.served_engine import Served
from benchmarks.common.transformers_engine import Transformers


class TransformersSystem(Transformers):
    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Run:
        return self.generate(mode, batch, **requests)


class Flashserve(PeerEngine):
    """The engine in this process, stepped as LLM.generate steps it, with requests that may arrive later."""

    def load(self, work: Workload) -> None:
        from benchmarks.common.engine import load_on_cpu

        self.settings = work.flashserve_settings()
        self.versions = {"torch": version("torch")}
        self.runner = load_on_cpu(Path(work.model), **self.settings)
        self.resolved = self.runner.resolved

    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Run:
        from benchmarks.batching.watch import Watch
        from benchmarks.common.engine import WatchedRunner
        from flashserve.engine.core import build_core
        from flashserve.protocol import GenerateRequest, SamplingParams

        work = Requests(**requests)
        watch = Watch(self.resolved.block_size, batch)
        core = build_core(replace(self.resolved, max_num_seqs=batch), WatchedRunner(self.runner, watch.see), "batching")
        watch.blocks = core.scheduler.blocks
        firsts, ends, tokens = ([0.0] * len(work), [0.0] * len(work), [0] * len(work))
        begun, sent, left = time.perf_counter(), 0, len(work)
        watch.begun = begun
        while left:
            while sent < len(work) and work.arrivals[sent] <= time.perf_counter() - begun:
                params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=work.outputs[sent])
                core.handle(GenerateRequest(sent, work.prompts[sent], params, arrival=time.monotonic()))
                sent += 1
            if not core.has_work:
                time.sleep(max(0.0, work.arrivals[sent] - (time.perf_counter() - begun)))
                continue
            outputs, now = core.step().outputs, time.perf_counter() - begun
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(output.error.message)
                i = output.request_id
                tokens[i] += len(output.token_ids)
                firsts[i] = firsts[i] or now
                if output.finish_reason is not None:
                    ends[i] = now
                    watch.ended(i)
                    left -= 1
        starts = [watch.starts[i] for i in range(len(work))]
        return Run(max(ends), tokens, starts=starts, firsts=firsts, ends=ends, details=watch.figures())


class ServedSystem(Served):
    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Run:
        """At most ``batch`` requests at once; the others wait in the client, as long as they must."""
        return self.stream(batch, **requests)


ENGINES: dict[str, Callable[[], PeerEngine]] = {
    "transformers": TransformersSystem,
    "flashserve": Flashserve,
    "served": ServedSystem,
}

if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]]())
