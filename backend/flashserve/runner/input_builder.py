"""From a scheduler's plan to a model's input: arithmetic on whole arrays in numpy, then one conversion each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from flashserve.models.model_input import ModelInput
from flashserve.runner.slots import SlotTable
from flashserve.scheduling.output import SchedulerOutput
from flashserve_kernels import AttentionBatch


@dataclass(frozen=True)
class StepInput:
    """A step, ready to run."""

    model: ModelInput
    sample_rows: np.ndarray
    """[N]: the plan's rows that sample, in the order of the logits."""
    sample_slots: np.ndarray
    """[N]: their slots."""
    sample_positions: np.ndarray
    """[N] int64: the positions whose logits they sample."""


class InputBuilder:
    """Applies a plan's changes to the slots and lays out its tokens."""

    def __init__(self, slots: SlotTable, block_size: int, device: torch.device) -> None:
        self._slots = slots
        self._block_size = block_size
        self._device = device

    def build(self, plan: SchedulerOutput) -> StepInput:
        """Rows are reordered: single tokens first, by length, so that attention can serve many with one call."""
        for admission in plan.admissions:
            self._slots.admit(admission)
        for row in plan.rows:
            if row.new_block_ids:
                self._slots.append_blocks(row)

        numbers = np.array([(r.slot, r.start, r.num_tokens, r.samples) for r in plan.rows], np.int64)
        order = np.lexsort((numbers[:, 1], numbers[:, 2] > 1))
        slots, starts, lens, samples = numbers[order].T
        rows = [plan.rows[index] for index in order.tolist()]

        ends = np.cumsum(lens)
        firsts = ends - lens
        row_of_token = np.repeat(np.arange(len(rows)), lens)
        positions = np.arange(ends[-1]) + (starts - firsts)[row_of_token]
        seq_lens = starts + lens
        # Only as many columns as the longest row needs.
        tables = self._slots.block_table[slots, : -(-int(seq_lens.max()) // self._block_size)]
        blocks = tables[row_of_token, positions // self._block_size].astype(np.int64)
        slot_mapping = blocks * self._block_size + positions % self._block_size

        sampling = np.flatnonzero(samples)
        attention = AttentionBatch(
            query_start_loc=self._to_device(np.concatenate(([0], ends)).astype(np.int32)),
            seq_lens=self._to_device(seq_lens.astype(np.int32)),
            block_tables=self._to_device(tables),
            slot_mapping=self._to_device(slot_mapping),
            block_size=self._block_size,
            host_query_lens=lens.tolist(),
            host_seq_lens=seq_lens.tolist(),
        )
        model = ModelInput(
            token_ids=self._token_ids([row.token_ids for row in rows], slots, firsts, int(ends[-1])),
            positions=self._to_device(positions),
            attention=attention,
            logits_rows=self._to_device(ends[sampling] - 1),
        )
        return StepInput(model, order[sampling], slots[sampling], seq_lens[sampling] - 1)

    def _token_ids(
        self, known: list[list[int]], slots: np.ndarray, firsts: np.ndarray, num_tokens: int
    ) -> torch.Tensor:
        """The plan's tokens, and the slots' own last samples where a row brings none."""
        decodes = np.array([not ids for ids in known])
        tokens = np.zeros(num_tokens, np.int64)
        filled = np.ones(num_tokens, bool)
        filled[firsts[decodes]] = False
        tokens[filled] = list(chain.from_iterable(known))
        token_ids = self._to_device(tokens)
        if decodes.any():
            last = self._slots.last_token.index_select(0, self._to_device(slots[decodes]))
            token_ids.index_copy_(0, self._to_device(firsts[decodes]), last)
        return token_ids

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
