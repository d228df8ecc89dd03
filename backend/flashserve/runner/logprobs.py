"""Log-probabilities of a step: of the samples whose requests ask for them, and of prompts' tokens.

They are of the logits as the model gave them. What comes before the choice of a token changes logits in place, so the
rows that are asked for are copied first. A step in which nobody asks does none of this.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flashserve.protocol import TokenLogprob
from flashserve.runner.device_queue import DeviceQueue
from flashserve.runner.input_builder import Arrangement
from flashserve.scheduling.output import Admission
from flashserve_kernels import MAX_TOP, Ops


@dataclass(frozen=True)
class LogprobRows:
    """Which rows of a step's logits are looked at: S of its samples, then P tokens of prompts."""

    samples: np.ndarray
    """[S] int64: among the step's samples."""
    num_samples: int
    """N: all of the step's; the rows that score prompts come behind them."""
    targets: np.ndarray
    """[P] int64: the prompts' tokens."""
    plan_rows: np.ndarray
    """[S + P] int64: whose they are, as places in the plan."""
    counts: np.ndarray
    """[S + P] int64: alternatives that each wants."""

    @property
    def num_top(self) -> int:
        return int(self.counts.max())

    def copy_logits(self, queue: DeviceQueue, logits: Tensor) -> Tensor:
        """[S + P, V], before anything changes them."""
        scored = np.arange(self.num_samples, self.num_samples + len(self.targets))
        rows = np.concatenate([self.samples, scored])
        return queue.run(lambda: logits.index_select(0, queue.to_device(rows)))

    def compute(self, queue: DeviceQueue, ops: Ops, logits: Tensor, sampled: Tensor) -> Tensor:
        """logits: what ``copy_logits`` gave; sampled: [N or more] int64. Returns the samples and the results in one
        tensor of int64, for one download: :meth:`unpack` takes it apart."""

        def run() -> Tensor:
            own = sampled[: self.num_samples]
            tokens = torch.cat([own[queue.to_device(self.samples)], queue.to_device(self.targets)])
            found = ops.log_probabilities(logits, tokens, min(self.num_top, logits.shape[1]))
            numbers = (own, found.rank, found.top_tokens.flatten(), _bits(found.chosen), _bits(found.top.flatten()))
            return torch.cat(numbers)

        return queue.run(run)

    def unpack(self, words: Tensor) -> tuple[list[int], dict[int, list[TokenLogprob]], dict[int, list[TokenLogprob]]]:
        """(Samples, log-probabilities of samples, those of prompts' tokens), the last two by place in the plan."""
        rows = len(self.plan_rows)
        per_row = (len(words) - self.num_samples) // (2 * rows) - 1
        tokens, ranks, top_tokens, chosen, top = words.split(
            [self.num_samples, rows, rows * per_row, rows, rows * per_row]
        )
        values = _numbers(chosen).tolist()
        alternatives = zip(
            top_tokens.view(rows, per_row).tolist(), _numbers(top).view(rows, per_row).tolist(), strict=True
        )
        of_samples: dict[int, list[TokenLogprob]] = {}
        of_prompts: dict[int, list[TokenLogprob]] = {}
        each = zip(self.plan_rows.tolist(), self.counts.tolist(), values, ranks.tolist(), alternatives, strict=True)
        for index, (place, count, value, rank, (ids, logprobs)) in enumerate(each):
            found = of_samples if index < len(self.samples) else of_prompts
            best = list(zip(ids[:count], logprobs[:count], strict=True))
            found.setdefault(place, []).append(TokenLogprob(value, rank, best))
        return tokens.tolist(), of_samples, of_prompts


@dataclass
class LogprobSlots:
    """What each slot's request asks for."""

    num_slots: int
    _samples: np.ndarray = field(init=False)
    """[slots] int64: alternatives of each sample; -1: no log-probabilities."""
    _prompts: np.ndarray = field(init=False)
    """The same of the prompt's tokens."""

    def __post_init__(self) -> None:
        self._samples = np.full(self.num_slots, -1, np.int64)
        self._prompts = np.full(self.num_slots, -1, np.int64)

    def admit(self, admission: Admission) -> None:
        """Start a slot afresh."""
        params, slot = admission.params, admission.slot
        self._samples[slot] = -1 if params.logprobs is None else min(params.logprobs, MAX_TOP)
        self._prompts[slot] = -1 if params.prompt_logprobs is None else min(params.prompt_logprobs, MAX_TOP)

    def rows(self, step: Arrangement) -> LogprobRows | None:
        """What a step is asked for, if anything."""
        wanted = self._samples[step.sample_slots]
        samples = np.flatnonzero(wanted >= 0)
        if not samples.size and not step.scored.tokens.size:
            return None
        prompts = step.scored.plan_rows
        return LogprobRows(
            samples=samples,
            num_samples=len(step.sampling),
            targets=step.scored.targets,
            plan_rows=np.concatenate([step.plan_rows[samples], prompts]),
            counts=np.concatenate([wanted[samples], self._prompts[step.scored.slots]]),
        )


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32).long()


def _numbers(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)
