"""From a scheduler's plan to a step's numbers: arithmetic on whole arrays in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from flashserve.runner.row_lengths import RowLengths
from flashserve.runner.slots import SlotTable
from flashserve.runner.staging import StepFields, StepSizes, fill_padding
from flashserve.scheduling.output import ScheduledRow, SchedulerOutput

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Scored:
    """P tokens of prompts whose log-probabilities are wanted. Their rows of logits come behind the sampled ones."""

    tokens: np.ndarray
    """[P] int64: the step's tokens before them, whose logits say how probable they were."""
    targets: np.ndarray
    """[P] int64: they themselves."""
    slots: np.ndarray
    """[P] int64."""
    plan_rows: np.ndarray
    """[P] int64: their rows' places in the plan."""


_NOTHING_SCORED = Scored(_NONE, _NONE, _NONE, _NONE)


@dataclass(frozen=True)
class Arrangement:
    """A plan's rows in the order in which they are computed: single tokens first, by length, so that attention can
    serve many with one call."""

    rows: list[ScheduledRow]
    slots: np.ndarray
    """[R] int64."""
    starts: np.ndarray
    """[R] int64: first position."""
    lens: np.ndarray
    """[R] int64: tokens."""
    sampling: np.ndarray
    """[N]: which of the rows are sampled; one that others fork off is sampled for each of them, too."""
    sample_slots: np.ndarray
    """[N] int64: for whom."""
    plan_rows: np.ndarray
    """[N]: their places in the plan."""
    changed_blocks: np.ndarray
    """[new_blocks] int64: flat places of the block table that changed."""
    pooled: Sequence[tuple[int, int, int]] = ()
    """(Place in the plan, first, end) of each row that pools: which of the step's tokens are summed for it."""
    scored: Scored = _NOTHING_SCORED

    @property
    def sizes(self) -> StepSizes:
        num_logits = len(self.sampling) + len(self.scored.tokens)
        num_pooled = sum(end - first for _, first, end in self.pooled)
        return StepSizes(int(self.lens.sum()), len(self.slots), num_logits, len(self.changed_blocks), num_pooled)

    @property
    def max_query_len(self) -> int:
        return int(self.lens.max())

    @property
    def lengths(self) -> RowLengths:
        """Of the rows as they are. Those of one token come first."""
        singles = int(np.count_nonzero(self.lens == 1))
        seq_lens = (self.starts + self.lens).tolist()
        return RowLengths(self.max_query_len, singles, singles, self.lens.tolist(), seq_lens)

    @property
    def sample_positions(self) -> np.ndarray:
        """[N] int64: the positions whose logits are sampled."""
        return (self.starts + self.lens)[self.sampling] - 1


class InputBuilder:
    """Applies a plan's changes to the slots and lays out its tokens."""

    def __init__(self, slots: SlotTable, block_size: int) -> None:
        self._slots = slots
        self._block_size = block_size

    def arrange(self, plan: SchedulerOutput) -> Arrangement:
        """Update the slots and order the rows."""
        for admission in plan.admissions:
            self._slots.admit(admission)
        changed = [self._slots.append_blocks(row) for row in plan.rows if row.new_block_ids]
        numbers = np.array([(r.slot, r.start, r.num_tokens, r.num_logits) for r in plan.rows], np.int64)
        order = np.lexsort((numbers[:, 1], numbers[:, 2] > 1))
        forks = np.flatnonzero(numbers[:, 2] == 0)
        if forks.size:
            order = order[numbers[order, 2] > 0]
        slots, starts, lens, num_logits = numbers[order].T
        sampling = np.flatnonzero(num_logits)
        sample_slots, plan_rows = slots[sampling], order[sampling]
        if forks.size:
            places = {slot: place for place, slot in enumerate(slots.tolist())}
            parents = [places[plan.rows[fork].fork_of] for fork in forks]
            sampling = np.concatenate([sampling, parents])
            sample_slots = np.concatenate([sample_slots, numbers[forks, 0]])
            plan_rows = np.concatenate([plan_rows, forks])
        return Arrangement(
            rows=[plan.rows[index] for index in order.tolist()],
            slots=slots,
            starts=starts,
            lens=lens,
            sampling=sampling,
            sample_slots=sample_slots,
            plan_rows=plan_rows,
            changed_blocks=np.concatenate(changed) if changed else _NONE,
            scored=_scored(plan, order, lens) if plan.num_scored else _NOTHING_SCORED,
            pooled=self._pooled(plan, order, lens) if plan.pools else (),
        )

    def fill(self, step: Arrangement, host: StepFields, sizes: StepSizes) -> None:
        """Write the step's numbers. sizes: those of the step, or of a captured step that it is padded to."""
        used = step.sizes
        T, R, N = used.tokens, used.seqs, len(step.sampling)
        ends = np.cumsum(step.lens)
        firsts = ends - step.lens
        row_of_token = np.repeat(np.arange(R), step.lens)
        positions = np.arange(T) + (step.starts - firsts)[row_of_token]
        blocks = self._slots.block_table[step.slots[row_of_token], positions // self._block_size].astype(np.int64)

        self._fill_token_ids(step, firsts, host.token_ids[:T])
        host.token_slots[:T] = step.slots[row_of_token]
        host.positions[:T] = positions
        host.slot_mapping[:T] = blocks * self._block_size + positions % self._block_size
        host.slots[:R] = step.slots
        host.seq_lens[:R] = step.starts + step.lens
        host.query_start_loc[0] = 0
        host.query_start_loc[1 : R + 1] = ends

        table = self._slots
        host.logits_rows[:N] = ends[step.sampling] - 1
        host.sample_slots[:N] = step.sample_slots
        host.sample_positions[:N] = step.sample_positions
        if len(step.scored.tokens):  # they are sampled, too, for a slot that nobody reads
            scored = slice(N, used.logits)
            host.logits_rows[scored] = step.scored.tokens
            host.sample_slots[scored] = table.spare_slot
            host.sample_positions[scored] = 0
        if len(host.table_index):
            host.table_index[:] = step.changed_blocks
            host.table_blocks[:] = table.block_table.reshape(-1)[step.changed_blocks]
        if step.pooled:
            host.pooled_rows[:] = np.concatenate([np.arange(first, end) for _, first, end in step.pooled])
        if (sizes.tokens, sizes.seqs, sizes.logits) != (T, R, used.logits):
            fill_padding(host, used, table.spare_slot)

    @staticmethod
    def _pooled(plan: SchedulerOutput, order: np.ndarray, lens: np.ndarray) -> list[tuple[int, int, int]]:
        firsts = np.cumsum(lens) - lens
        return [
            (place, first + wanted[0], first + wanted[1])
            for place, first in zip(order.tolist(), firsts.tolist(), strict=True)
            if (wanted := plan.rows[place].pooled) is not None
        ]

    @staticmethod
    def _fill_token_ids(step: Arrangement, firsts: np.ndarray, out: np.ndarray) -> None:
        """The plan's tokens; -1 where a row brings none, which stands for the slot's own last sample."""
        decodes = np.array([row.is_decode for row in step.rows])
        if decodes.all():
            out[:] = -1
            return
        known = np.ones(len(out), bool)
        known[firsts[decodes]] = False
        out[known] = list(chain.from_iterable(row.token_ids for row in step.rows))
        out[~known] = -1


def _scored(plan: SchedulerOutput, order: np.ndarray, lens: np.ndarray) -> Scored:
    """order, lens: of the rows that are computed."""
    firsts = np.cumsum(lens) - lens
    tokens: list[int] = []
    targets: list[int] = []
    slots: list[int] = []
    places: list[int] = []
    for first, place in zip(firsts.tolist(), order.tolist(), strict=True):
        row = plan.rows[place]
        before = first + row.first_scored - 1 - row.start
        tokens += range(before, before + len(row.scored))
        targets += row.scored
        slots += [row.slot] * len(row.scored)
        places += [place] * len(row.scored)
    return Scored(*(np.array(column, np.int64) for column in (tokens, targets, slots, places)))
