"""flashserve's engine in this process, opened up: steps are driven, and what its scheduler plans is watched."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.protocol import SamplingParams
from flashserve.runner.device import CpuDevice
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepResult


def load_on_cpu(model: Path, **settings: Any) -> ModelRunner:
    """A model on this CPU, ready to step. settings: those of model.json."""
    config = EngineConfig.from_mapping({"model": str(model), **settings}, Path.cwd())
    return load_runner(open_model(config), config, CpuDevice())


def repeatable_step(
    runner: ModelRunner, rows: int, queries: int, context: int, *, fill: bool = False
) -> SchedulerOutput:
    """A step that can be run again and again: the last ``queries`` tokens of equal rows of ``context`` tokens.

    The rows are admitted with a step of their own first; fill: with steps that compute their whole context, without
    which a CPU's cache is not in memory yet. Where the cache is smaller than all rows, blocks far apart are shared: it
    is many times a GPU's L2, so they come from memory all the same.
    """
    resolved, rng = runner.resolved, random.Random(0)
    width, num_blocks, vocab_size = -(-context // resolved.block_size), resolved.num_blocks, resolved.model.vocab_size
    order = rng.sample(range(num_blocks), num_blocks)
    tables = [[order[(index * width + i) % num_blocks] for i in range(width)] for index in range(rows)]
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)

    def row(index: int, count: int, table: list[int]) -> ScheduledRow:
        tokens = [rng.randrange(vocab_size) for _ in range(count)] if count > 1 else []
        return ScheduledRow(index, index, context - count, count, tokens, table, 1)

    count, together = (context, max(1, resolved.max_num_batched_tokens // context)) if fill else (queries, rows)
    for group in (range(rows)[first : first + together] for first in range(0, rows, together)):
        admissions = [Admission(index, index, greedy, 0, context, ()) for index in group]
        admitted = [row(index, count, tables[index]) for index in group]
        runner.wait(runner.submit(SchedulerOutput(0, admissions, admitted, count * len(group), [])))
    return SchedulerOutput(1, [], [row(index, queries, []) for index in range(rows)], rows * queries, [])


class Watch:
    """Implements Runner over a CPU's, and sees every plan before it runs: how full the batches are, and the memory.
    All sums are over steps."""

    run_ahead = False
    blocks: BlockManager
    begun: float

    def __init__(self, runner: ModelRunner, block_size: int, batch: int) -> None:
        self._runner = runner
        self._block_size = block_size
        self._batch = batch
        self.starts: dict[int, float] = {}
        self._first_steps: dict[int, int] = {}
        self._last_steps: dict[int, int] = {}
        self._held: dict[int, int] = {}
        """Tokens whose keys and values each running request has, by its id."""
        self._steps = self._row_steps = 0
        self._used = self._allocated = self._running = 0

    def submit(self, plan: SchedulerOutput) -> Any:
        now = time.perf_counter() - self.begun
        for admission in plan.admissions:
            self.starts.setdefault(admission.request_id, now)
            self._first_steps.setdefault(admission.request_id, self._steps)
        for row in plan.rows:
            self._held[row.request_id] = row.start + row.num_tokens
        self._steps += 1
        self._row_steps += sum(row.num_logits for row in plan.rows)
        self._used += sum(self._held.values())
        self._running += len(self._held)
        self._allocated += (self.blocks.num_blocks - self.blocks.num_free) * self._block_size
        return self._runner.submit(plan)

    def wait(self, handle: Any) -> StepResult:
        return self._runner.wait(handle)

    def close(self) -> None:
        """The runner is used again."""

    def ended(self, request_id: int) -> None:
        del self._held[request_id]
        self._last_steps[request_id] = self._steps

    def figures(self) -> dict[str, Any]:
        """When each request had its steps, and sums over steps, from which shares of any reservation can be had."""
        return {
            "block_size": self._block_size,
            "steps": self._steps,
            "first_steps": [self._first_steps[i] for i in sorted(self._first_steps)],
            "last_steps": [self._last_steps[i] for i in sorted(self._last_steps)],
            "row_steps": self._row_steps,
            "room": self._steps * self._batch,
            "kv_used": self._used,
            "kv_allocated": self._allocated,
            "running": self._running,
        }
