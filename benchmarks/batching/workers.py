"""The systems that are compared, each a process: python -m benchmarks.batching.workers transformers|flashserve|served

All of them have the same weights in bfloat16 and the same threads, take token ids, decode greedily and give each
request exactly as many tokens as it asks for.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from benchmarks.batching.workload import Outcome
from benchmarks.batching.workload import Workload as Requests
from benchmarks.common.protocol import PeerEngine, Workload, serve

PAGE_SIZE = 32  # tokens; transformers' default of 256 is a GPU's, and reserves that much for each request
POLL_S = 0.001


class Transformers(PeerEngine):
    """`generate` with static batches, one request being a batch of 1, and its own continuous batching."""

    def load(self, work: Workload) -> None:
        import torch
        import transformers

        torch.set_num_threads(work.threads)
        self.settings = {"dtype": "bfloat16", "attn_implementation": "sdpa", "page_size": PAGE_SIZE}
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            work.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.manager: Any = None
        self.manager_for: tuple[int, int] = (0, 0)

    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Outcome:
        work = Requests(**requests)
        if mode == "static":
            self.close()  # its thread and its cache
            return self._static(work, batch)
        return self._continuous(work, batch)

    def _static(self, work: Requests, batch: int) -> Outcome:
        """Batches of what has arrived; each ends for all when its longest request has ended."""
        starts, ends = [0.0] * len(work), [0.0] * len(work)
        begun, done = time.perf_counter(), 0
        while done < len(work):
            time.sleep(max(0.0, work.arrivals[done] - (time.perf_counter() - begun)))
            now = time.perf_counter() - begun
            arrived = sum(arrival <= now for arrival in work.arrivals[done : done + batch])
            group = range(done, done + max(1, arrived))
            self._generate([work.prompts[i] for i in group], max(work.outputs[i] for i in group))
            end = time.perf_counter() - begun
            for i in group:
                starts[i], ends[i] = now, end
            done = group.stop
        return Outcome(ends[-1], list(work.outputs), starts, ends, ends)

    def _generate(self, prompts: list[list[int]], output: int) -> None:
        import torch

        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        with torch.inference_mode():
            self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )

    def _continuous(self, work: Requests, batch: int) -> Outcome:
        longest = max(len(prompt) + output for prompt, output in zip(work.prompts, work.outputs, strict=True))
        if self.manager_for != (batch, longest):
            self._start_manager(batch, longest)
        begun, ids, done = time.perf_counter(), [], {}
        while len(done) < len(work):
            if len(ids) < len(work) and time.perf_counter() - begun >= work.arrivals[len(ids)]:
                i = len(ids)
                add = self.manager.add_request
                ids.append(add(work.prompts[i], max_new_tokens=work.outputs[i], record_timestamps=True))
                continue
            result = self.manager.get_result(timeout=POLL_S)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                done[result.request_id] = result
            elif result is None and not self.manager.is_running():
                raise RuntimeError("the generation thread ended; its error is in the log")
        results = [done[name] for name in ids]
        starts, ends = ([result.lifespan[which] - begun for result in results] for which in (0, 1))
        firsts = [result.timestamps[0] - begun for result in results]
        return Outcome(max(ends), [len(result.generated_tokens) for result in results], starts, firsts, ends)

    def _start_manager(self, batch: int, longest: int) -> None:
        """A manager as large as the batch: its SDPA mask spans the whole cache, so more would be slower."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=batch * (math.ceil(longest / PAGE_SIZE) + 1),
            max_batch_tokens=512,
            max_requests_per_batch=batch,
            allow_block_sharing=False,
        )
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self.manager.start()
        self.manager_for = (batch, longest)

    def close(self) -> None:
        if self.manager is not None:
            self.manager.stop(block=True)
            self.manager, self.manager_for = None, (0, 0)


class Flashserve(PeerEngine):
    """The engine in this process, stepped as LLM.generate steps it, with requests that may arrive later."""

    def load(self, work: Workload) -> None:
        from benchmarks.common.engine import load_runner

        self.settings = flashserve_settings(work)
        self.versions = {"torch": version("torch")}
        self.resolved, self.runner = load_runner(work.model, **self.settings)

    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Outcome:
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
        return Outcome(max(ends), tokens, starts, firsts, ends, watch.figures())


class Served(PeerEngine):
    """flashserve through Triton: `flashserve serve`, and a client that streams over gRPC on the same cores."""

    def load(self, work: Workload) -> None:
        from benchmarks.common.serving import serving

        self.settings = flashserve_settings(work)
        self.versions = {name: version(name) for name in ("tritonclient", "nvidia-pytriton")}
        self.server = contextlib.ExitStack()
        self.urls = self.server.enter_context(serving({"m": {"model": work.model, **self.settings}}))

    def run(self, mode: str, batch: int, requests: dict[str, Any]) -> Outcome:
        return asyncio.run(self._run(Requests(**requests), batch))

    async def _run(self, work: Requests, batch: int) -> Outcome:
        """At most ``batch`` requests at once; the others wait in the client, as long as they must."""
        from flashserve_client import AsyncClient

        starts, firsts, ends, tokens = [0.0] * len(work), [0.0] * len(work), [0.0] * len(work), [0] * len(work)
        free = asyncio.Semaphore(batch)

        async def one(client: AsyncClient, i: int) -> None:
            await asyncio.sleep(max(0.0, work.arrivals[i] - (time.perf_counter() - begun)))
            async with free:
                starts[i] = time.perf_counter() - begun
                stream = client.stream(work.prompts[i], max_tokens=work.outputs[i], temperature=0, ignore_eos=True)
                async for delta in stream:
                    if delta.completion_tokens:
                        firsts[i] = firsts[i] or time.perf_counter() - begun
                        tokens[i] += delta.completion_tokens
            ends[i] = time.perf_counter() - begun

        async with AsyncClient(self.urls.grpc, model="m") as client:
            await client.models()  # connects
            begun = time.perf_counter()
            await asyncio.gather(*(one(client, i) for i in range(len(work))))
        return Outcome(max(ends), tokens, starts, firsts, ends)

    def close(self) -> None:
        self.server.close()


def flashserve_settings(work: Workload) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "enable_prefix_caching": False,
        "max_model_len": work.max_len,
        "max_num_seqs": work.max_requests,
        "num_threads": work.threads,
    }


ENGINES = {"transformers": Transformers, "flashserve": Flashserve, "served": Served}

if __name__ == "__main__":
    serve(ENGINES[sys.argv[1]]())
