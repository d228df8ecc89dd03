"""What the scheduler tells the runner, and what comes back. Frozen and serialisable (ranks, replay)."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from flashserve.protocol import SamplingParams


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A request takes a slot: its persistent state in the runner starts afresh.

    A request that resumes after preemption is admitted again, maybe to another slot.
    """

    request_id: int
    slot: int
    params: SamplingParams
    seed: int
    """The seed in force: the request's own, or one drawn for it."""
    num_prompt_tokens: int
    """Length of the original prompt: the sample at position p (p counts from 0, the position of the token that
    the logits belong to) is generated token number ``p + 1 - num_prompt_tokens``, counted from 0."""
    end_token_ids: tuple[int, ...]
    """Tokens that would end the request; the sampler masks them for the first ``params.min_tokens`` samples."""


class ScheduledRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request's share of a step: tokens at positions ``start .. start + num_tokens - 1``.

    Prefill, chunked prefill, decode and recomputation differ only in the numbers.
    """

    request_id: int
    slot: int
    start: int
    num_tokens: int
    token_ids: list[int]
    """The tokens to compute; empty for a decode row: the runner reads its own last sample of the slot."""
    new_block_ids: list[int]
    """Appended to the slot's block table (the whole table with the first row after an admission)."""
    num_logits: int
    """How many of the row's last tokens are sampled: 1 if it ends with the last known token of its request, else 0.
    More would verify drafts, which nobody makes yet."""

    @property
    def is_decode(self) -> bool:
        """Whether it computes what was sampled last, which only the runner knows."""
        return not self.token_ids


class SchedulerOutput(msgspec.Struct, frozen=True, array_like=True):
    """One step. Admissions apply before rows. A slot is in at most one row."""

    step: int
    admissions: list[Admission]
    rows: list[ScheduledRow]
    num_tokens: int
    """Sum of the rows' ``num_tokens``."""
    freed_slots: list[int]
    """Slots given back since the last step; applied before admissions (a freed slot may be admitted anew)."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The samples of a step: ``token_ids[i]`` belongs to ``rows[i]``, as many as the row has logits."""

    token_ids: list[list[int]]
