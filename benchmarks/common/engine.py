"""flashserve's engine in this process, opened up: what its scheduler plans can be watched, and steps are driven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig, ResolvedConfig, resolve
from flashserve.models.registry import read_model_facts
from flashserve.runner.device import read_device_facts
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import SchedulerOutput, StepOutput


def load_runner(model: Path, **settings: Any) -> tuple[ResolvedConfig, ModelRunner]:
    """A model on this CPU, ready to step. settings: those of model.json."""
    config = EngineConfig.from_mapping({"model": str(model), **settings}, Path.cwd())
    resolved = resolve(config, read_model_facts(config, "cpu"), read_device_facts("cpu"))
    runner = ModelRunner(resolved)
    runner.load_weights()
    runner.prepare(resolved)
    runner.warm_up()
    return resolved, runner


class WatchedRunner:
    """Implements Runner over a CPU's: ``see`` is called with each plan before it runs."""

    run_ahead = False

    def __init__(self, runner: Any, see: Callable[[SchedulerOutput], None]) -> None:
        self._runner, self._see = runner, see

    def submit(self, plan: SchedulerOutput) -> Any:
        self._see(plan)
        return self._runner.submit(plan)

    def wait(self, handle: Any) -> StepOutput:
        return self._runner.wait(handle)

    def close(self) -> None:
        """The runner is used again."""
