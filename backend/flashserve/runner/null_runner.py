"""A device that computes nothing: each sample is the previous token plus one, and certain.

For measuring everything around the model; never chosen by itself. ``"device": "null"`` in model.json steps as fast as
the engine can, ``"null:12.5"`` takes 12.5 ms for each step, like a model that leaves the processor to others.
"""

from __future__ import annotations

import time

import numpy as np

from flashserve.config import DeviceFacts, EngineConfig, ModelFacts
from flashserve.errors import ConfigError
from flashserve.protocol import TokenLogprob
from flashserve.scheduling.output import SchedulerOutput, StepResult

NULL_DEVICE = DeviceFacts(kind="cpu", name="null", total_bytes=1 << 40, free_bytes=1 << 36)
PRINTABLE = range(40, 120)  # ids that are ASCII characters in a byte-level vocabulary: one character per token


class NullRunner:
    """Implements Runner."""

    run_ahead = False

    def __init__(self, vocab_size: int, step_s: float = 0.0, hidden_size: int = 1) -> None:
        self._ids = [i for i in PRINTABLE if i < vocab_size] or [0]
        self._step_s = step_s
        self._hidden_size = hidden_size
        self._scored_slots: set[int] = set()

    def submit(self, plan: SchedulerOutput) -> StepResult:
        if self._step_s:
            time.sleep(self._step_s)
        ids = self._ids
        samples = [[ids[(row.start + row.num_tokens) % len(ids)]] if row.num_logits else [] for row in plan.rows]
        for place, mask in plan.token_masks:
            bits = int.from_bytes(mask, "little")
            samples[place] = [(bits & -bits).bit_length() - 1]  # the first that may be
        for admission in plan.admissions:
            asks = admission.params.logprobs is not None
            (self._scored_slots.add if asks else self._scored_slots.discard)(admission.slot)
        if not (self._scored_slots or plan.num_scored or plan.pools):
            return StepResult(samples)
        rows = list(enumerate(plan.rows))
        of_samples = {i: [_certain(samples[i][0])] for i, r in rows if samples[i] and r.slot in self._scored_slots}
        of_prompts = {i: list(map(_certain, r.scored)) for i, r in rows if r.scored}
        ones = np.ones(self._hidden_size, np.float32)
        return StepResult(samples, of_samples, of_prompts, {i: ones for i, r in rows if r.pooled is not None})

    def wait(self, handle: StepResult) -> StepResult:
        return handle

    def close(self) -> None:
        """Nothing to free."""


def _certain(token_id: int) -> TokenLogprob:
    return TokenLogprob(0.0, 1, [(token_id, 0.0)])


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
