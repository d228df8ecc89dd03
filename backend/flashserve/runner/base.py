"""The seam between the engine and whatever runs the model."""

from __future__ import annotations

from typing import Any, Protocol

from flashserve.scheduling.output import SchedulerOutput, StepResult


class Runner(Protocol):
    """Runs steps in the order of ``submit``; at most two are in flight (the engine runs one ahead on a GPU)."""

    run_ahead: bool
    """Whether ``submit`` returns before the step is done, so that the next step may be submitted before
    ``wait``. A CPU runner computes in ``submit`` and says False."""

    def submit(self, plan: SchedulerOutput) -> Any:
        """Start a step and return its handle. Raises only for faults, never for a request's content."""
        ...

    def wait(self, handle: Any) -> StepResult:
        """Block until the step's samples are on the host."""
        ...

    def close(self) -> None:
        """Free the device's memory. Idempotent."""
        ...
