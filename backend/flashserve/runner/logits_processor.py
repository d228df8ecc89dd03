"""What requests want changed in their logits, between a step's model and its sampling.

In the order of :class:`flashserve_kernels.sampling.Stage`: bad words, biases, penalties, DRY, XTC. A step none of whose
rows wants any of it returns at once and sends nothing to the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from flashserve.protocol import SamplingParams
from flashserve.runner.device_queue import DeviceQueue
from flashserve.runner.dry import dry_penalties
from flashserve.runner.input_builder import Arrangement
from flashserve.runner.sampler_state import seed_of, temperature_of
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput
from flashserve_kernels import Ops

Edits = list[tuple[int, np.ndarray, np.ndarray]]
"""(row, tokens [K] int64, what is added to their logits [K] float32)"""

SMALLEST_REPETITION = 1e-30
"""What is less is 0 as a float32, and nothing is divided by it."""
_ALIGNED = 4
"""Rows of a table of float32 begin at multiples of 16 bytes, of which compiled kernels know."""


@dataclass
class _Wishes:
    """What the request of one slot wants."""

    params: SamplingParams
    seed: np.int64
    temperature: float
    num_prompt_tokens: int
    known: np.ndarray
    """[room] int64: prompt and output."""
    num_known: int
    is_uncounted: bool
    """The device's counts are still those of the slot's last owner."""
    forced: list[int] = field(default_factory=list)
    """Known tokens that the device has neither sampled nor counted."""
    has_sampled: bool = True
    """Whether the last row did, and so counted the next one's first token."""
    biases: tuple[np.ndarray, np.ndarray] = field(init=False)
    """Those of every step: of ``logit_bias`` and of bad words of one token."""

    def __post_init__(self) -> None:
        banned = {ids[0]: -np.inf for ids in self.params.bad_word_ids if len(ids) == 1}
        biases = {**self.params.logit_bias, **banned}
        self.biases = np.array(list(biases), np.int64), np.array(list(biases.values()), np.float32)

    @classmethod
    def of(cls, admission: Admission) -> _Wishes | None:
        params = admission.params
        temperature = temperature_of(admission)
        excludes = params.xtc_probability > 0 and temperature > 0
        if not (excludes or params.penalizes or params.needs_known_tokens or params.logit_bias or params.bad_word_ids):
            return None
        known = np.array(admission.known_token_ids, np.int64)
        return cls(
            params, seed_of(admission), temperature, admission.num_prompt_tokens, known, len(known), params.penalizes
        )

    def learn(self, row: ScheduledRow) -> None:
        """Take the tokens of a row that are new."""
        end = row.start + row.num_tokens
        if end > len(self.known):
            self.known = np.concatenate([self.known, np.zeros(end, np.int64)])  # doubled, so this is rare
        if end > self.num_known:
            self.known[row.start : end] = row.token_ids
            if self.params.penalizes:
                self.forced += row.token_ids[self.num_known + self.has_sampled - row.start :]
            self.num_known = end
        self.has_sampled = row.num_logits > 0

    def phrase_ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Last tokens of bad words of which the output ends with all others."""
        output = self.known[self.num_prompt_tokens : self.num_known]
        tokens = [
            ids[-1]
            for ids in self.params.bad_word_ids
            if len(ids) > 1 and output[1 - len(ids) :].tolist() == [*ids[:-1]]
        ]
        return np.array(tokens, np.int64), np.full(len(tokens), -np.inf, np.float32)


class LogitsProcessor:
    """The wishes by slot, and the counts of generated tokens, on the device, where tokens are known first.

    Counts and the mask of the prompt take 5 bytes per slot and token of the vocabulary (256 slots of 152k: 195 MB) and
    are made when the first request is penalised.
    """

    def __init__(self, num_slots: int, vocab_size: int, ops: Ops, device: torch.device) -> None:
        self._shape = num_slots, vocab_size
        self._ops = ops
        self._device = device
        self._wishes: dict[int, _Wishes] = {}
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    def follow(self, plan: SchedulerOutput) -> None:
        """Take in who comes and goes, and the tokens that the host knows."""
        for slot in plan.freed_slots:
            self._wishes.pop(slot, None)
        for admission in plan.admissions:
            self._wishes.pop(admission.slot, None)
            wishes = _Wishes.of(admission)
            if wishes is not None:
                self._wishes[admission.slot] = wishes
        if not self._wishes:
            return
        for row in plan.rows:
            own = self._wishes.get(row.slot) if row.token_ids else None
            if own is not None and (own.params.needs_known_tokens or own.params.penalizes):
                own.learn(row)

    def apply(self, queue: DeviceQueue, logits: Tensor, step: Arrangement) -> Tensor | None:
        """Change the step's logits. logits: [N or more, V]. Returns what :meth:`count` takes; None: nothing counts."""
        if not self._wishes:
            return None
        slots = step.sample_slots.tolist()
        rows = [(row, self._wishes[slot]) for row, slot in enumerate(slots) if slot in self._wishes]
        if not rows:
            return None
        logits = logits[: len(slots)]
        looking_back = [(row, own) for row, own in rows if own.params.needs_known_tokens]
        phrases = [(row, *own.phrase_ends()) for row, own in looking_back]
        self._add(queue, logits, [(row, *own.biases) for row, own in rows] + phrases)
        counted = self._penalize(queue, logits, step, [(row, own) for row, own in rows if own.params.penalizes])
        dry = [(row, own) for row, own in looking_back if own.params.dry_multiplier > 0]
        self._add(queue, logits, [(row, *dry_penalties(own.known[: own.num_known], own.params)) for row, own in dry])
        random = [(row, own) for row, own in rows if own.params.xtc_probability > 0 and own.temperature > 0]
        self._exclude(queue, logits, step, random)
        return counted

    def count(self, queue: DeviceQueue, slots: Tensor, tokens: Tensor) -> None:
        """Count the step's samples. slots: what :meth:`apply` returned; tokens: [N or more] int64."""
        counts = self._counts
        assert counts is not None
        queue.run(lambda: self._ops.count_tokens_(counts, slots, tokens[: len(slots)]))

    def compile(self, logits: Tensor) -> None:
        """Start the kernels once on a step's logits, [N, V], as a table of one slot."""
        vocab = self._shape[1]
        slots = torch.zeros(1, dtype=torch.int64, device=self._device)
        counts = torch.zeros((1, vocab), dtype=torch.int32, device=self._device)
        in_prompt = torch.zeros((1, vocab), dtype=torch.bool, device=self._device)
        numbers = torch.ones(1, device=self._device)
        self._ops.apply_penalties_(logits[:1], slots, counts, in_prompt, numbers, numbers, numbers)
        self._ops.count_tokens_(counts, slots, slots)

    # --- the kinds of wishes ------------------------------------------------------------------------------

    def _add(self, queue: DeviceQueue, logits: Tensor, edits: Edits) -> None:
        edits = [edit for edit in edits if edit[1].size]
        if not edits:
            return
        rows = np.repeat([edit[0] for edit in edits], [edit[1].size for edit in edits])
        tokens, values = (np.concatenate([edit[part] for edit in edits]) for part in (1, 2))
        queue.run(lambda: self._ops.add_bias_(logits, *map(queue.to_device, (rows, tokens, values))))

    def _penalize(
        self, queue: DeviceQueue, logits: Tensor, step: Arrangement, rows: list[tuple[int, _Wishes]]
    ) -> Tensor | None:
        if not rows:
            return None
        if self._counts is None:
            self._counts, self._in_prompt = queue.run(
                lambda: tuple(torch.zeros(self._shape, dtype=t, device=self._device) for t in (torch.int32, torch.bool))
            )
        counts, in_prompt = self._counts, self._in_prompt
        assert in_prompt is not None
        count = len(step.sample_slots)
        places = np.full(count, -1, np.int64)
        numbers = np.ones((3, -(-count // _ALIGNED) * _ALIGNED), np.float32)
        for row, own in rows:
            slot = places[row] = step.sample_slots[row]
            params = own.params
            repetition = max(params.repetition_penalty, SMALLEST_REPETITION)
            numbers[:, row] = repetition, params.presence_penalty, params.frequency_penalty
            if own.is_uncounted:
                self._count_known(queue, int(slot), own)
        self._count_forced(queue, step, [(row, own) for row, own in rows if own.forced])
        slots, columns = queue.to_device(places), queue.to_device(numbers)
        queue.run(
            lambda: self._ops.apply_penalties_(
                logits, slots, counts, in_prompt, *(column[:count] for column in columns)
            )
        )
        return slots

    def _count_known(self, queue: DeviceQueue, slot: int, own: _Wishes) -> None:
        """Begin with what the host knows: the prompt, and after a preemption what was generated before it."""
        own.is_uncounted = False
        counts, in_prompt = self._counts, self._in_prompt
        assert counts is not None and in_prompt is not None
        known = queue.to_device(own.known[: own.num_known])
        prompt, output = known[: own.num_prompt_tokens], known[own.num_prompt_tokens :]

        def begin() -> None:
            in_prompt[slot].zero_().index_fill_(0, prompt, True)
            counts[slot].zero_().index_add_(0, output, torch.ones_like(output, dtype=torch.int32))

        queue.run(begin)

    def _count_forced(self, queue: DeviceQueue, step: Arrangement, rows: list[tuple[int, _Wishes]]) -> None:
        """Count tokens that came into the texts without being sampled."""
        if not rows:
            return
        slots = np.concatenate([np.full(len(own.forced), step.sample_slots[row]) for row, own in rows])
        tokens = np.concatenate([own.forced for _, own in rows])
        self.count(queue, queue.to_device(slots), queue.to_device(tokens))
        for _, own in rows:
            own.forced = []

    def _exclude(self, queue: DeviceQueue, logits: Tensor, step: Arrangement, rows: list[tuple[int, _Wishes]]) -> None:
        if not rows:
            return
        places = np.array([row for row, _ in rows], np.int64)
        wanted = [(own.temperature, own.params.xtc_probability, own.params.xtc_threshold) for _, own in rows]
        temperature, probability, threshold = queue.to_device(np.array(wanted, np.float32).T.copy())
        integers = np.stack([places, np.array([own.seed for _, own in rows]), step.sample_positions[places]])
        chosen, seeds, positions = queue.to_device(integers)
        queue.run(
            lambda: self._ops.exclude_top_choices_(
                logits, chosen, temperature, probability, threshold, seeds, positions
            )
        )
