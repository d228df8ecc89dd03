"""A device that computes nothing: each sample is the previous token plus one.

For measuring everything around the model (``"device": "null"`` in model.json); never chosen by itself.
"""

from __future__ import annotations

from flashserve.config import DeviceFacts
from flashserve.scheduling.output import SchedulerOutput, StepOutput

NULL_DEVICE = DeviceFacts(kind="cpu", name="null", total_bytes=1 << 40, free_bytes=1 << 36, num_threads=1)
PRINTABLE = range(40, 120)  # ids that are ASCII characters in a byte-level vocabulary: one character per token


class NullRunner:
    """Implements Runner."""

    run_ahead = False

    def __init__(self, vocab_size: int) -> None:
        self._ids = [i for i in PRINTABLE if i < vocab_size] or [0]

    def submit(self, plan: SchedulerOutput) -> StepOutput:
        ids = self._ids
        return StepOutput([[ids[(row.start + row.num_tokens) % len(ids)]] if row.samples else [] for row in plan.rows])

    def wait(self, handle: StepOutput) -> StepOutput:
        return handle

    def close(self) -> None:
        """Nothing to free."""
