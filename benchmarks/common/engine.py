"""flashserve's engine in this process, opened up: what its scheduler plans can be watched, and steps are driven."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.runner.device import CpuDevice
from flashserve.runner.loading import load_runner
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import SchedulerOutput, StepOutput


def load_on_cpu(model: Path, **settings: Any) -> ModelRunner:
    """A model on this CPU, ready to step. settings: those of model.json."""
    config = EngineConfig.from_mapping({"model": str(model), **settings}, Path.cwd())
    return load_runner(open_model(config), config, CpuDevice())


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
