"""A runner that computes nothing but checks every plan.

Instead of keys and values, ``FakeRunner`` keeps for every (block, offset) the chain hash of the token prefix that
was written there. A row may attend only to its own sequence, so wrong sharing, use after free and missing writes
show at once. Samples are a function of the prefix and the sample's index alone: what a sequence must generate follows
from its message (:class:`Oracle`), whatever the batching, preemption, caching, forking and drafting.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from oracle import NONSENSE, Name, Oracle, check, hidden_state, name_of

from flashserve.protocol import TokenLogprob
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.output import MAX_SCORED_TOKENS, Admission, ScheduledRow, SchedulerOutput, StepResult


@dataclass
class Slot:
    """The runner's persistent state of a running sequence."""

    admission: Admission
    oracle: Oracle
    table: list[int] = field(default_factory=list)
    end: int = 0
    """Tokens computed so far, cached ones included."""
    last_sample: int | None = None
    is_masked: bool = False

    @property
    def name(self) -> Name:
        return name_of(self.admission.request_id, self.admission.index)


@dataclass
class Step:
    """The handle of a submitted step."""

    number: int
    output: StepResult
    written: list[tuple[int, int]]


class FakeRunner:
    """Implements Runner."""

    def __init__(
        self,
        config: SchedulerConfig,
        num_blocks: int,
        block_size: int,
        oracles: dict[Name, Oracle],
        run_ahead: bool,
        drafts: bool,
        on_plan: Callable[[SchedulerOutput], None],
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.oracles = oracles
        self.run_ahead = run_ahead
        self.drafts = drafts
        self.fault: str | None = None
        """"submit" or "wait": what fails from now on."""
        self.failed_in_a_row = 0
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, Slot] = {}
        self.generated: Counter[Name] = Counter()
        """Tokens per sequence, over all its admissions: samples, and what was forced behind them."""
        self.jumps = 0
        """Rows with forced tokens."""
        self.parts = 0
        """Of those, rows that forced tokens did not fit."""
        self.lengths: set[int] = set()
        """How many samples rows gave."""
        self._on_plan = on_plan
        self._in_flight: deque[Step] = deque()
        self._last_step = 0

    def submit(self, plan: SchedulerOutput) -> Step:
        check(len(self._in_flight) <= int(self.run_ahead), "too many steps in flight", plan.step)
        check(plan.step > self._last_step, "steps are numbered upwards", plan.step)
        self._last_step = plan.step
        self._on_plan(plan)
        self._change_slots(plan)
        self._check_shape(plan)
        self._copy_blocks(plan.block_copies)
        written = self._write(plan.rows)
        samples = [self._attend(row) for row in plan.rows]
        for index, _ in plan.token_masks:
            self.slots[plan.rows[index].slot].is_masked = True
        self._check_decodes_go_on(plan)
        check(plan.pools == any(row.pooled is not None for row in plan.rows), "rows that pool are not announced", plan)
        pooled = {index: self._pool(row) for index, row in enumerate(plan.rows) if row.pooled is not None}
        scores = {place: self._score(row) for place, row in enumerate(plan.rows) if row.scored}
        check(sum(map(len, scores.values())) == plan.num_scored <= MAX_SCORED_TOKENS, "scored tokens", plan)
        step = Step(plan.step, StepResult(samples, {}, scores, pooled), written)
        self._in_flight.append(step)
        if self.fault == "submit":
            self._fail(step)
        return step

    def wait(self, handle: Step) -> StepResult:
        check(self._in_flight[0] is handle, "steps are waited for in their order", handle.number)
        if self.fault == "wait":
            self._fail(handle)
        self._in_flight.popleft()
        self.failed_in_a_row = 0
        return handle.output

    def close(self) -> None:
        """Nothing to free."""

    def _score(self, row: ScheduledRow) -> list[TokenLogprob]:
        """A token of the prompt is as probable as its number says."""
        prompt = self.slots[row.slot].oracle.message.prompt_token_ids
        end = row.first_scored + len(row.scored)
        check(row.start < row.first_scored and end <= row.start + row.num_tokens + 1, "scores without logits", row)
        check(prompt[row.first_scored : end] == row.scored, "other tokens are scored than the prompt's", row)
        return [TokenLogprob(token, 1, []) for token in row.scored]

    def _fail(self, step: Step) -> None:
        """The step failed: nobody knows what its KV holds, nor what a step behind it computes from that."""
        for spoiled in list(self._in_flight)[self._in_flight.index(step) :]:
            ids, scores = spoiled.output.token_ids, spoiled.output.prompt_logprobs
            nonsense = {place: [TokenLogprob(NONSENSE, 1, [])] * len(found) for place, found in scores.items()}
            pooled = dict.fromkeys(spoiled.output.pooled, np.full(1, np.nan, np.float32))
            spoiled.output = StepResult([[NONSENSE] if own else [] for own in ids], {}, nonsense, pooled)
            for block, offset in spoiled.written:
                self.kv[block][offset] = None
        self._in_flight.remove(step)
        self.failed_in_a_row += 1
        raise RuntimeError("broken")

    def _change_slots(self, plan: SchedulerOutput) -> None:
        for slot in plan.freed_slots:
            check(slot in self.slots, "a slot is freed that nobody has", slot)
            del self.slots[slot]
        for admission in plan.admissions:
            oracle = self.oracles[name_of(admission.request_id, admission.index)]
            check(0 <= admission.slot < self.config.max_num_seqs, "no such slot", admission.slot)
            check(admission.slot not in self.slots, "the slot is taken", admission.slot)
            check(admission.num_prompt_tokens == oracle.num_prompt, "wrong prompt length", admission)
            check(set(admission.end_token_ids) == oracle.ends, "wrong end tokens", admission)
            check(admission.params == oracle.message.params, "wrong params", admission)
            check(admission.seed == (admission.params.seed or 0) + admission.index, "wrong seed", admission)
            self._check_known_tokens(admission, oracle)
            self.slots[admission.slot] = Slot(admission, oracle)
        names = [slot.name for slot in self.slots.values()]
        check(len(set(names)) == len(names), "a sequence has two slots", names)

    def _check_known_tokens(self, admission: Admission, oracle: Oracle) -> None:
        """Of what looks back prompt and output, of all others nothing."""
        params, generated = admission.params, self.generated[name_of(admission.request_id, admission.index)]
        known = oracle.tokens[: oracle.num_prompt + generated] if params.penalizes or params.needs_known_tokens else []
        check(admission.known_token_ids == known, "wrong known tokens", admission, known)

    def _check_shape(self, plan: SchedulerOutput) -> None:
        check(bool(plan.rows), "a step without rows", plan.step)
        slots = [row.slot for row in plan.rows]
        check(len(set(slots)) == len(slots), "a slot is in two rows", slots)
        check(plan.num_tokens == sum(row.num_tokens for row in plan.rows), "wrong token count", plan)
        check(plan.num_tokens <= self.config.max_num_batched_tokens, "over budget", plan.num_tokens)

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        sources, targets = {a for a, _ in copies}, {b for _, b in copies}
        check(len(targets) == len(copies) and not sources & targets, "the order of copies matters", copies)
        held = {block for slot in self.slots.values() for block in slot.table}
        check(not held & targets, "a copy overwrites a block", copies)
        for source, target in copies:
            self.kv[target] = list(self.kv[source])

    def _write(self, rows: list[ScheduledRow]) -> list[tuple[int, int]]:
        """Write the KV of all rows, as the real runner does before any row attends."""
        begun = {index for index, slot in self.slots.items() if slot.table}
        for row in rows:
            table = self.slots[row.slot].table
            table += row.new_block_ids
            check(len(set(table)) == len(table), "a block twice in a table", table)
        # A block may be shared by a sequence that begins in the very step that fills it, never before.
        holders = Counter(block for index in begun for block in self.slots[index].table)
        written = []
        for row in rows:
            slot = self.slots[row.slot]
            self._check_row(row, slot)
            slot.end = row.start + row.num_tokens
            for position, value in enumerate(self._values(row, slot), row.start):
                block, offset = slot.table[position // self.block_size], position % self.block_size
                check(holders[block] == (row.slot in begun), "a shared block is written", row, block)
                self.kv[block][offset] = value
                written.append((block, offset))
        check(len(set(written)) == len(written), "two rows write to one place", written)
        return written

    @staticmethod
    def _values(row: ScheduledRow, slot: Slot) -> list[int]:
        """What a row writes; drafts may be wrong, and then so is what they write."""
        values = slot.oracle.chain[row.start : row.start + row.num_tokens - max(0, row.num_logits - 1)]
        for draft in row.token_ids[len(values) :]:
            values.append(hash((values[-1], draft)))
        return values

    def _check_row(self, row: ScheduledRow, slot: Slot) -> None:
        """Right sequence, right positions, right tokens, enough blocks."""
        check(slot.name == name_of(row.request_id, row.index), "another sequence has this slot", row, slot)
        end = row.start + row.num_tokens
        if row.fork_of is not None:
            self._check_fork(row, slot)
            return
        if slot.end == 0:  # the first row after an admission may start behind a cached prefix
            check(row.start % self.block_size == 0, "a partial block was shared", row)
        else:
            check(row.start == slot.end, "positions are skipped or repeated", row, slot.end)
        check(row.num_tokens >= 1 and len(slot.table) * self.block_size >= end, "blocks are missing", row, slot.table)
        known = slot.oracle.num_prompt + self.generated[slot.name]
        drafts = max(0, row.num_logits - 1)
        check(drafts < row.num_tokens and end - drafts <= known, "tokens that nobody knows yet", row, known)
        if slot.oracle.message.pooling is not None:
            check(row.num_logits == 0, "an embedding samples nothing", row)
            check(row.pooled is not None or end < known, "the prompt's last row must answer", row)
        else:
            check(row.pooled is None, "pooled without being asked to", row)
            at_end = end - drafts == known
            check((row.num_logits > 0) == at_end, "must sample exactly at the last known token", row, known)
        check(end < slot.oracle.limit, "a row after the length limit", row)
        # A decode row brings no token: the runner reads its own last sample.
        tokens = row.token_ids[: row.num_tokens - drafts] or [slot.last_sample]
        if slot.last_sample is not None and len(tokens) > 1:
            self.jumps += 1
            self.parts += not row.num_logits
        check(tokens == slot.oracle.tokens[row.start : end - drafts], "wrong tokens", row, slot.last_sample)
        check(
            not slot.admission.params.needs_known_tokens or bool(row.token_ids), "needs to be told its last token", row
        )

    def _check_fork(self, row: ScheduledRow, slot: Slot) -> None:
        """It begins where its parent's prompt ends, in this very step, with the full blocks of the prompt."""
        assert row.fork_of is not None
        parent = self.slots[row.fork_of]
        check(
            parent.oracle.message is slot.oracle.message and parent.name != slot.name, "no child of this", row, parent
        )
        check(slot.end == 0 and self.generated[slot.name] == 0, "a fork of what has begun", row, slot)
        check(row.start == parent.end == slot.oracle.num_prompt, "a fork within the prompt", row, parent.end)
        check((row.num_tokens, row.num_logits, row.token_ids) == (0, 1, []), "a fork samples and computes nothing", row)
        full = row.start // self.block_size
        check(
            slot.table == parent.table[:full], "a fork begins with its parent's full blocks", slot.table, parent.table
        )

    def _attend(self, row: ScheduledRow) -> list[int]:
        """Check all KV that the row reads, but that of drafts; returns its samples."""
        slot = self.slots[row.slot]
        size, oracle = self.block_size, slot.oracle
        first = row.start + row.num_tokens - row.num_logits  # the first position whose logits are sampled
        end = first + 1 if row.num_logits else row.start + row.num_tokens
        for index in range(end // size if row.fork_of is not None else -(-end // size)):
            expected = oracle.chain[index * size : min(end, (index + 1) * size)]
            found = self.kv[slot.table[index]][: len(expected)]
            check(found == expected, "wrong or missing KV", row, index, slot.table[index])
        samples: list[int] = []
        for draft in [*row.token_ids[row.num_tokens - row.num_logits + 1 :], None][: row.num_logits]:
            samples.append(oracle.sample(first + len(samples)))
            if draft != samples[-1] or first + len(samples) == len(oracle.chain):
                break
        self.lengths.add(len(samples))
        if samples:
            slot.end = first + len(samples)
            slot.last_sample = samples[-1]
            self.generated[slot.name] = oracle.known_after.get(slot.end, slot.end + 1) - oracle.num_prompt
        return samples

    def _pool(self, row: ScheduledRow) -> np.ndarray:
        """The sum of the hidden states of those tokens that are asked for, all of which the row computes."""
        assert row.pooled is not None
        first, end = row.pooled
        check(0 <= first <= end <= row.num_tokens, "tokens of another row are pooled", row)
        chain = self.slots[row.slot].oracle.chain[row.start + first : row.start + end]
        return np.array([sum(map(hidden_state, chain))], np.float32)

    def _check_decodes_go_on(self, plan: SchedulerOutput) -> None:
        """Every sequence that decodes has a row in every step, unless the sample in flight reaches its limit, or it
        looks back or drafts on samples that are in flight, or these decide its mask."""
        chosen = {row.slot for row in plan.rows}
        for index, slot in self.slots.items():
            at_limit = slot.end == slot.oracle.limit - 1
            left_out = slot.last_sample is not None and index not in chosen and not at_limit
            awaited = self.run_ahead and (self.drafts or slot.admission.params.needs_known_tokens or slot.is_masked)
            check(not left_out or awaited, "a decode was left out", slot)
