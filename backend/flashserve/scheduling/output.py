"""What the scheduler tells the runner, and what comes back. Frozen and serialisable (ranks, replay)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from flashserve.protocol import Logprobs, SamplingParams, TokenLogprob

MAX_SCORED_TOKENS = 64
"""Of prompts, in one step: each takes a row of logits (0.6 MB of 150k tokens in float32), which are kept until the
log-probabilities are known."""


class Admission(msgspec.Struct, frozen=True, array_like=True):
    """A sequence of a request takes a slot: its persistent state in the runner starts afresh.

    One that resumes after preemption is admitted again, maybe to another slot.
    """

    request_id: int
    slot: int
    params: SamplingParams
    seed: int
    """The seed in force: the request's own, or one drawn for it, plus the sequence's index."""
    num_prompt_tokens: int
    """Length of the original prompt: the sample at position p (p counts from 0, the position of the token that
    the logits belong to) is generated token number ``p + 1 - num_prompt_tokens``, counted from 0."""
    end_token_ids: tuple[int, ...]
    """Tokens that would end the sequence; the sampler masks them for the first ``params.min_tokens`` samples."""
    index: int = 0
    """Which of the request's sequences."""
    known_token_ids: list[int] = []
    """Prompt and what was generated, of a sequence that is penalised or needs its known tokens; else empty."""


class ScheduledRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One sequence's share of a step: tokens at positions ``start .. start + num_tokens - 1``.

    Prefill, chunked prefill, decode and recomputation differ only in the numbers. A fork computes nothing yet: it
    samples the last logits of another row of the step, with its own slot's parameters, and goes on from there.
    """

    request_id: int
    slot: int
    start: int
    num_tokens: int
    token_ids: list[int]
    """The tokens to compute; empty for a decode row: the runner reads its own last sample of the slot. A sequence that
    needs its known tokens gets them all, and so no row before its last sample is known."""
    new_block_ids: list[int]
    """Appended to the slot's block table (the whole table with the first row after an admission)."""
    num_logits: int
    """How many of the row's last tokens are sampled: 0 if the row ends before the last known token of its sequence,
    else 1 + drafts. Drafts are the tokens behind the last known one; the samples say how many of them were right. No
    runner of a model checks drafts yet."""
    index: int = 0
    """Which of the request's sequences."""
    fork_of: int | None = None
    """Of a fork: the slot whose row it branches off; ``start`` is that row's end, and ``num_tokens`` is 0."""
    scored: list[int] = []
    """Tokens of the prompt whose log-probabilities are wanted: those at positions ``first_scored`` and on, each by the
    logits of the token before it, which is one of the row's."""
    first_scored: int = 0
    pooled: tuple[int, int] | None = None
    """(first, end) of the row's tokens whose final hidden states are to be summed; maybe none, but zeros come back."""

    @property
    def is_decode(self) -> bool:
        """Whether it computes what was sampled last, which only the runner knows."""
        return not self.token_ids and self.num_tokens > 0


class SchedulerOutput(msgspec.Struct, frozen=True, array_like=True):
    """One step: freed slots, then admissions, then copies of blocks, then rows. A slot is in at most one row.

    Positions and counts are the host's, none is kept by slot on a device: where it depends on what is accepted how many
    samples a row gives (``num_logits > 1``), its sequence gets no further row until they are known, also when the
    engine runs ahead. Drafts are made of known tokens, so such a sequence could not go on earlier. Only drafts that are
    made on a device would need its positions there.
    """

    step: int
    admissions: list[Admission]
    rows: list[ScheduledRow]
    num_tokens: int
    """Sum of the rows' ``num_tokens``."""
    freed_slots: list[int]
    """Slots given back since the last step; applied before admissions (a freed slot may be admitted anew)."""
    block_copies: list[tuple[int, int]] = []
    """(from, to): what shares a block gets its own before it writes there. No block is written twice, or written and
    read."""
    num_scored: int = 0
    """Sum of the rows' ``scored``: at most MAX_SCORED_TOKENS."""
    pools: bool = False
    """Whether any of the rows does."""
    token_masks: list[tuple[int, bytes]] = []
    """(index of a row that samples, which tokens it may choose): a bit for each token, the lowest of each byte first,
    in whole words of 4 bytes. Tokens behind the last word may not be chosen."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """The samples of a step: ``token_ids[i]`` belongs to ``rows[i]``. A row without logits has none, one with logits at
    least one and at most as many as logits: the drafts that were right, and the sample behind them."""

    token_ids: list[list[int]]
    logprobs: Mapping[int, list[TokenLogprob]] = field(default_factory=dict)
    """By place in ``rows``, of those that ask: one for each of the row's samples."""
    prompt_logprobs: Mapping[int, list[TokenLogprob]] = field(default_factory=dict)
    """By place in ``rows``: one for each of the row's ``scored``."""
    pooled: Mapping[int, Any] = field(default_factory=dict)
    """By the index of a row that pools: the sum of its tokens' hidden states, [hidden] float32 (numpy)."""
    device_s: float | None = None
    """How long the device computed, in seconds. None: from the step's submission to its end, as any clock shows."""

    def logprobs_of(self, place: int) -> Logprobs | None:
        """A row's, if it has any. Of several samples the last ones may count for nothing: so do theirs."""
        if place not in self.logprobs and place not in self.prompt_logprobs:
            return None
        return Logprobs(self.logprobs.get(place, []), self.prompt_logprobs.get(place, []))
