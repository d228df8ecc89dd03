"""A device that computes nothing: each sample is the previous token plus one.

For measuring everything around the model; never chosen by itself. ``"device": "null"`` in model.json steps as fast as
the engine can, ``"null:12.5"`` takes 12.5 ms for each step, like a model that leaves the processor to others.
"""

from __future__ import annotations

import time

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts
from flashserve.errors import ConfigError
from flashserve.scheduling.output import SchedulerOutput, StepResult

NULL_DEVICE = DeviceFacts(kind="cpu", name="null", total_bytes=1 << 40, free_bytes=1 << 36)
PRINTABLE = range(40, 120)  # ids that are ASCII characters in a byte-level vocabulary: one character per token


class NullRunner:
    """Implements Runner."""

    run_ahead = False

    def __init__(self, vocab_size: int, step_s: float = 0.0) -> None:
        self._ids = [i for i in PRINTABLE if i < vocab_size] or [0]
        self._step_s = step_s

    def submit(self, plan: SchedulerOutput) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        ids = self._ids
        tokens = [[ids[(row.start + row.num_tokens) % len(ids)]] if row.num_logits else [] for row in plan.rows]
        for row, mask in plan.token_masks:
            bits = int.from_bytes(mask, "little")
            tokens[row] = [(bits & -bits).bit_length() - 1]  # the first that may be
        return StepResult(tokens)

    def wait(self, handle: StepResult) -> StepResult:
        return handle

    def close(self) -> None:
        """Nothing to free."""


def null_block_bytes(config: EngineConfig, model: ModelFacts) -> int:
    """What a KV block would take in torch's own layout, so that there are as many of them; nothing is stored in them.
    Raises ConfigError as a CPU without native kernels does."""
    import torch

    from flashserve.runner.kv_cache import kv_block_bytes
    from flashserve_kernels import Ops

    return kv_block_bytes(Ops(torch.device("cpu")), config, model)


def step_seconds(device: str) -> float:
    """The pace in a null device's name. Raises ConfigError if it is no number of milliseconds."""
    _, _, pace = device.partition(":")
    try:
        return float(pace or 0) / 1000
    except ValueError:
        raise ConfigError(f"device must be null or null:MILLISECONDS, not {device!r}") from None
