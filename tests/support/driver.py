"""Engines without a server, for tests of what a model computes: a `Driver` plays the scheduler, an `Engine` has the
real one. `SeenLogits` shows what each token was sampled from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashserve.config import EngineConfig
from flashserve.engine.core import EngineCore, build_core
from flashserve.models.files import ModelFiles
from flashserve.models.registry import open_model
from flashserve.protocol import GenerateRequest, SamplingParams
from flashserve.runner.device import CpuDevice, Device
from flashserve.runner.input_builder import Arrangement, InputBuilder
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.runner.row_lengths import RowLengths
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import array_fields, num_bytes, tensor_fields
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput

GREEDY = SamplingParams(temperature=0)


def random_prompts(lengths: Sequence[int], seed: int = 1, vocab_size: int = 512) -> list[list[int]]:
    """Token ids without special tokens."""
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


def load(
    folder: Path | str = "", device: Device | None = None, files: ModelFiles | None = None, **settings: Any
) -> ModelRunner:
    """A tiny model of a folder, or of files that lie elsewhere; ``settings`` are those of model.json."""
    device = device or CpuDevice()
    # One thread: tiny tensors gain nothing from two, and wait for each other where other processes are busy.
    defaults = {"device": "cpu", "kv_cache_memory_bytes": 64 << 20, "num_threads": 1}
    if device.torch_device.type == "cuda":
        defaults = {"device": "cuda"}
    config = EngineConfig(**{"model": str(folder), **defaults, **settings})
    with device.loading():
        return load_runner(files or open_model(config), config, device)


class SeenLogits(dict[tuple[int, int], Tensor]):
    """The sampled logits of a runner's further steps by (request id, position): [V] float32 on the host."""

    def __init__(self, runner: ModelRunner) -> None:
        runner.observe_logits = self._keep

    def _keep(self, step: Arrangement, logits: Tensor) -> None:
        rows = logits[: len(step.sampling)].to("cpu", torch.float32, copy=True)  # recorded steps write over theirs
        for row, place, position in zip(rows, step.sampling.tolist(), step.sample_positions.tolist(), strict=True):
            self[step.rows[place].request_id, position] = row


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

    def first_logits(self, prompt: list[int]) -> Tensor:
        """The logits of a prompt's last token, [V] float32."""
        seen = SeenLogits(self.runner)
        self.generate([prompt], 1)
        self.runner.observe_logits = None
        return seen[0, len(prompt) - 1]

    @torch.inference_mode()
    def prompt_logits(self, tokens: list[int]) -> Tensor:
        """The logits of every token of a prompt that starts afresh, [T, V] float32: op by op, over the first blocks."""
        block_size = self.resolved.block_size
        slots = SlotTable(1, -(-len(tokens) // block_size), torch.device("cpu"))
        model = replace(self.runner.step_model, block_table=slots.device_block_table, last_tokens=slots.last_tokens)
        builder = InputBuilder(slots, block_size)
        blocks = list(range(-(-len(tokens) // block_size)))
        row = ScheduledRow(0, 0, 0, len(tokens), tokens, blocks, 1)
        step = builder.arrange(SchedulerOutput(0, [], [row], len(tokens), []))
        buffer = torch.zeros(num_bytes(step.sizes), dtype=torch.uint8)
        builder.fill(step, array_fields(buffer, step.sizes), step.sizes)
        fields = replace(tensor_fields(buffer, step.sizes), logits_rows=torch.arange(len(tokens)))
        return model.logits(fields, RowLengths(len(tokens))).float()

    def run(self, admissions: list[Admission], rows: list[ScheduledRow]) -> list[list[int]]:
        """One step."""
        self.steps += 1
        lens = [row.num_tokens for row in rows]
        self.mixed_steps += max(lens) > 1 and min(lens) == 1
        plan = SchedulerOutput(self.steps, admissions, rows, sum(lens), [])
        return self.runner.wait(self.runner.submit(plan)).token_ids


class Engine:
    """The real scheduler and core over a runner, and the tokens that came out."""

    def __init__(self, runner: ModelRunner, **params: Any) -> None:
        """``params``: of requests that say nothing else."""
        self.runner = runner
        self.core: EngineCore = build_core(runner.resolved, runner, "test")
        self.tokens: dict[int, list[int]] = {}
        self._params = {"temperature": 0.0, "ignore_eos": True, **params}

    def add(self, request_id: int, prompt: Sequence[int], **params: Any) -> None:
        self.tokens[request_id] = []
        own = SamplingParams(**{**self._params, **params})
        self.core.handle(GenerateRequest(request_id, list(prompt), own, arrival=0.0))

    def step(self) -> None:
        for output in self.core.step().outputs:
            assert output.error is None, output.error
            self.tokens[output.request_id] += output.token_ids

    def finish(self) -> None:
        while self.core.has_work:
            self.step()

    def generate(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[list[int]]:
        """Tokens for all prompts at once; their ids are those of the list."""
        for index, prompt in enumerate(prompts):
            self.add(index, prompt, **params)
        self.finish()
        return [self.tokens[index] for index in range(len(prompts))]


def sampled_logits(engine: Engine, first_id: int, prompts: Sequence[Sequence[int]], num_tokens: int) -> Tensor:
    """[num_tokens, V] from which the first prompt's tokens were sampled, while the others ran beside it."""
    seen = SeenLogits(engine.runner)
    for number, prompt in enumerate(prompts):
        engine.add(first_id + number, prompt)
    engine.finish()
    last = len(prompts[0]) - 1
    return torch.stack([seen[first_id, last + number] for number in range(num_tokens)])
