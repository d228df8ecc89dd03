"""flashserve's engine in this process, opened up: steps are driven, and what its scheduler plans is watched."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.runner.device import CpuDevice
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.output import SchedulerOutput, StepResult


def load_on_cpu(model: Path, **settings: Any) -> ModelRunner:
    """A model on this CPU, ready to step. settings: those of model.json."""
    config = EngineConfig.from_mapping({"model": str(model), **settings}, Path.cwd())
    return load_runner(open_model(config), config, CpuDevice())


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
