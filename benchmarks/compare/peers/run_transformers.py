"""transformers: `generate` one request after the other, `generate` with a static batch, and continuous batching."""

from __future__ import annotations

import math
import time
from typing import Any

from benchmarks.common.protocol import PeerEngine, Run, Workload, serve

PAGE_SIZE = 32  # tokens; the default of 256 is a GPU's, and reserves that much for each request


class Transformers(PeerEngine):
    def load(self, work: Workload) -> None:
        import torch
        import transformers

        torch.set_num_threads(work.threads)
        self.work = work
        self.mode = work.options["mode"]
        self.settings = {"dtype": "bfloat16", "attn_implementation": "sdpa", "mode": self.mode}
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            work.model, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self.manager: Any = None
        self.manager_for: tuple[int, int] = (0, 0)

    def run(self, prompts: list[list[int]], output_tokens: int) -> Run:
        if self.mode == "continuous":
            return self._continuous(prompts, output_tokens)
        batches = [prompts] if self.mode == "static" else [[prompt] for prompt in prompts]
        started = time.perf_counter()
        token_ids = [ids for batch in batches for ids in self._generate(batch, output_tokens)]
        seconds = time.perf_counter() - started
        return Run(seconds, [len(ids) for ids in token_ids], token_ids)

    def _generate(self, prompts: list[list[int]], output_tokens: int) -> list[list[int]]:
        import torch

        batch = torch.tensor(prompts)
        with torch.inference_mode():
            tokens = self.model.generate(
                batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [row[batch.shape[1] :] for row in tokens.tolist()]

    def _continuous(self, prompts: list[list[int]], output_tokens: int) -> Run:
        length = len(prompts[0]) + output_tokens
        if self.manager_for != (len(prompts), length):
            self._start_manager(len(prompts), length, output_tokens)
        started = time.perf_counter()
        ids = self.manager.add_requests(inputs=prompts, max_new_tokens=output_tokens)
        done: dict[str, list[int]] = {}
        while len(done) < len(prompts):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                if result.error is not None:
                    raise RuntimeError(result.error)
                done[result.request_id] = result.generated_tokens
            elif result is None and not self.manager.is_running():
                raise RuntimeError("the generation thread ended; its error is in the log")
        seconds = time.perf_counter() - started
        return Run(seconds, [len(done[name]) for name in ids], [done[name] for name in ids])

    def _start_manager(self, requests: int, length: int, output_tokens: int) -> None:
        """A manager as large as the workload: its SDPA mask spans the whole cache."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.close()
        blocks = requests * (math.ceil(length / PAGE_SIZE) + 1)
        config = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=blocks,
            max_batch_tokens=max(512, requests),
            max_requests_per_batch=requests,
            allow_block_sharing=False,
        )
        self.settings |= {"page_size": PAGE_SIZE, "max_batch_tokens": "max(512, requests)"}
        generation = GenerationConfig(max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        self.manager = self.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self.manager.start()
        self.manager_for = (requests, length)

    def close(self) -> None:
        if self.manager is not None:
            self.manager.stop(block=True)
            self.manager = None


if __name__ == "__main__":
    serve(Transformers())
