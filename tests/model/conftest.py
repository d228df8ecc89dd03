"""A driver that runs a model's runner through random ragged steps, and transformers' answer to compare with."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from flashserve.config import EngineConfig
from flashserve.models.files import ModelFiles
from flashserve.models.registry import open_model
from flashserve.protocol import SamplingParams
from flashserve.runner.device import CpuDevice, Device
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput

GREEDY = SamplingParams(temperature=0)


def load(
    folder: Path | str = "", device: Device | None = None, files: ModelFiles | None = None, **settings: Any
) -> ModelRunner:
    """A tiny model of a folder, or of files that lie elsewhere."""
    # One thread: tiny tensors gain nothing from two, and wait for each other where other processes are busy.
    defaults = {"model": str(folder), "device": "cpu", "kv_cache_memory_bytes": 64 << 20, "num_threads": 1}
    config = EngineConfig(**{**defaults, **settings})
    return load_runner(files or open_model(config), config, device or CpuDevice())


class Driver:
    """Stands in for the scheduler: random requests advance in each step, by random amounts, in shuffled blocks."""

    def __init__(self, **settings: Any) -> None:
        self.runner = load(**settings)
        self.resolved = self.runner.resolved
        self.steps = 0
        self.mixed_steps = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        params: Sequence[SamplingParams] | None = None,
        *,
        seed: int = 0,
        max_chunk: int = 10**9,
        everyone: bool = False,
        end_token_ids: tuple[int, ...] = (),
    ) -> list[list[int]]:
        """``num_tokens`` tokens for each prompt.

        max_chunk: prompt tokens in one row at most; everyone: all requests advance in every step.
        """
        rng = random.Random(seed)
        block_size = self.resolved.block_size
        free_blocks = rng.sample(range(self.resolved.num_blocks), self.resolved.num_blocks)
        slots = rng.sample(range(self.resolved.max_num_seqs), len(prompts))
        generated: list[list[int]] = [[] for _ in prompts]
        computed, num_blocks = [0] * len(prompts), [0] * len(prompts)
        while any(len(tokens) < num_tokens for tokens in generated):
            unfinished = [i for i, tokens in enumerate(generated) if len(tokens) < num_tokens]
            chosen = unfinished if everyone else rng.sample(unfinished, rng.randint(1, len(unfinished)))
            rows, admissions = [], []
            for i in chosen:
                if computed[i] == 0:
                    own = params[i] if params else GREEDY
                    seed_in_force = own.seed if own.seed is not None else i
                    admissions.append(Admission(i, slots[i], own, seed_in_force, len(prompts[i]), end_token_ids))
                rest = len(prompts[i]) - computed[i]
                count = 1 if rest <= 0 else min(rest, max_chunk if everyone else rng.randint(1, max_chunk), 512)
                token_ids = list(prompts[i][computed[i] : computed[i] + count]) if rest > 0 else []
                wanted = -(-(computed[i] + count) // block_size)
                new_blocks = [free_blocks.pop() for _ in range(wanted - num_blocks[i])]
                num_blocks[i] = wanted
                rows.append(ScheduledRow(i, slots[i], computed[i], count, token_ids, new_blocks, int(count >= rest)))
                computed[i] += count
            for i, new in zip(chosen, self.run(admissions, rows), strict=True):
                generated[i] += new
        return generated

    def first_logits(self, prompt: list[int]) -> torch.Tensor:
        """The logits of a prompt's last token, [V] float32."""
        seen = []
        steps = self.runner._steps
        run = steps.logits

        def watched(step):
            logits = run(step)
            seen.append(logits[0].float().clone())
            return logits

        steps.logits = watched
        try:
            self.generate([prompt], 1)
        finally:
            del steps.logits
        return seen[-1]

    def run(self, admissions: list[Admission], rows: list[ScheduledRow]) -> list[list[int]]:
        """One step."""
        self.steps += 1
        lens = [row.num_tokens for row in rows]
        self.mixed_steps += max(lens) > 1 and min(lens) == 1
        plan = SchedulerOutput(self.steps, admissions, rows, sum(lens), [])
        return self.runner.wait(self.runner.submit(plan)).token_ids


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """``drive(folder, **model.json)`` gives a loaded Driver; closed at the test's end."""
    drivers: list[Driver] = []

    def make(folder: Path | str = "", **settings: Any) -> Driver:
        drivers.append(Driver(folder=folder, **settings))
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.runner.close()


@pytest.fixture
def load_model() -> Callable[..., ModelRunner]:
    """``load_model(folder, device, **model.json)``: a tiny model, ready for its first step."""
    return load


@pytest.fixture(scope="session")
def greedy_reference() -> Callable[..., list[list[int]]]:
    """``greedy_reference(folder, prompts, n)``: what transformers' own generate gives in float32."""

    def generate(folder: Path, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.generation_config.eos_token_id = None
        return [
            model.generate(torch.tensor([list(prompt)]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0)[
                0, len(prompt) :
            ].tolist()
            for prompt in prompts
        ]

    return generate


@pytest.fixture(scope="session")
def random_prompts() -> Callable[..., list[list[int]]]:
    """``random_prompts(lengths)``: token ids without special tokens."""

    def make(lengths: Sequence[int], seed: int = 1, vocab_size: int = 512) -> list[list[int]]:
        rng = random.Random(seed)
        return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]

    return make
