"""transformers, with the best documented settings of each of its ways to batch."""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.common.protocol import EngineSetup, PeerEngine, Requests, Run, serve

PAGE_SIZE = 32  # tokens; the default of 256 is a GPU's, and reserves that much for each request
POLL_S = 0.001


class Transformers(PeerEngine):
    """`generate` with static batches, one request being a batch of 1, and its own continuous batching."""

    def load(self, setup: EngineSetup) -> None:
        import torch
        import transformers

        torch.set_num_threads(setup.threads)
        self.settings = {"dtype": "bfloat16", "attn_implementation": "sdpa", "page_size": PAGE_SIZE}
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            setup.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.manager: Any = None
        self.manager_for: tuple[int, int] = (0, 0)

    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        """mode: "static" or "continuous"."""
        if mode == "continuous":
            return self._continuous(batch, requests)
        self.close()  # the other mode's thread and cache
        return self._static(batch, requests)

    def _static(self, batch: int, requests: Requests) -> Run:
        """Batches of what has arrived; each ends for all when its longest request has ended."""
        count, outputs = len(requests), requests.outputs
        starts, ends = [0.0] * count, [0.0] * count
        token_ids: list[list[int]] = []
        begun, done = time.perf_counter(), 0
        while done < count:
            time.sleep(max(0.0, requests.arrivals[done] - (time.perf_counter() - begun)))
            now = time.perf_counter() - begun
            arrived = sum(arrival <= now for arrival in requests.arrivals[done : done + batch])
            group = range(done, done + max(1, arrived))
            rows = self._generate([requests.prompts[i] for i in group], max(outputs[i] for i in group))
            token_ids += [row[: outputs[i]] for i, row in zip(group, rows, strict=True)]
            end = time.perf_counter() - begun
            for i in group:
                starts[i], ends[i] = now, end
            done = group.stop
        return Run(ends[-1], list(outputs), token_ids, starts, ends, ends)

    def _generate(self, prompts: list[list[int]], output: int) -> list[list[int]]:
        import torch

        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        with torch.inference_mode():
            tokens = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=output,
                min_new_tokens=output,
                do_sample=False,
                pad_token_id=0,
            )
        return [row[longest:] for row in tokens.tolist()]

    def _continuous(self, batch: int, requests: Requests) -> Run:
        if self.manager_for != (batch, requests.longest):
            self._start_manager(batch, requests.longest)
        ids: list[str] = []
        done: dict[str, Any] = {}
        begun = time.perf_counter()
        while len(done) < len(requests):
            if len(ids) < len(requests) and time.perf_counter() - begun >= requests.arrivals[len(ids)]:
                i = len(ids)
                add = self.manager.add_request
                ids.append(add(requests.prompts[i], max_new_tokens=requests.outputs[i], record_timestamps=True))
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
        token_ids = [result.generated_tokens for result in results]
        return Run(max(ends), list(map(len, token_ids)), token_ids, starts, firsts, ends)

    def _start_manager(self, batch: int, longest: int) -> None:
        """A manager as large as the batch: its SDPA mask spans the whole cache, so more would be slower."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=batch * (math.ceil(longest / PAGE_SIZE) + 1),
            max_batch_tokens=max(512, batch),
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


if __name__ == "__main__":
    serve(Transformers())
