"""A runner that computes nothing but checks every plan, and a small engine around it.

Instead of keys and values, ``FakeRunner`` keeps for every (block, offset) the chain hash of the token prefix that
was written there. A row may attend only to its own sequence, so wrong sharing, use after free and missing writes
show at once. Samples are a function of the prefix alone: what a request must generate follows from its message
(:class:`Oracle`), whatever the batching, preemption and caching.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from flashserve.protocol import FinishReason, GenerateRequest, SamplingParams, TokenOutput
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepResult
from flashserve.scheduling.scheduler import Scheduler, SchedulerConfig

VOCAB_SIZE = 97
EOS = (0, 1)
NONSENSE = -1  # what a step gives that ran on spoiled KV


def check(condition: bool, message: str, *values: object) -> None:
    """Like assert, but stays under ``python -O`` and shows the values."""
    if not condition:
        raise AssertionError(f"{message}: {values}")


def sample_after(prefix: int) -> int:
    """The token that the fake model gives after a prefix, known by its chain hash."""
    return (prefix >> 8) % VOCAB_SIZE


class Oracle:
    """What a request must generate and why it must end, from its message alone."""

    def __init__(self, message: GenerateRequest, eos_token_ids: tuple[int, ...], max_model_len: int) -> None:
        self.message = message
        params = message.params
        self.num_prompt = len(message.prompt_token_ids)
        self.ends = frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else eos_token_ids)
        self.tokens = list(message.prompt_token_ids)
        # Of ints only: Python's hash of these is the same in every process. The salt separates what may be shared.
        self.chain: list[int] = []
        prefix = zlib.crc32(message.cache_salt.encode())
        for token in self.tokens:
            prefix = hash((prefix, token))
            self.chain.append(prefix)
        self.limit = max_model_len
        if params.max_tokens is not None:
            self.limit = min(max_model_len, self.num_prompt + params.max_tokens)
        self.reason: FinishReason = "length"
        while True:
            token = self.sample(len(self.tokens) - 1)
            self.tokens.append(token)
            self.chain.append(hash((self.chain[-1], token)))
            if token in self.ends and len(self.generated) > params.min_tokens:
                self.reason = "stop"
                break
            if len(self.tokens) >= self.limit:
                break

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def sample(self, position: int) -> int:
        """The sample at ``position``; a sampler masks what would end the request before min_tokens."""
        token = sample_after(self.chain[position])
        if position + 1 - self.num_prompt < self.message.params.min_tokens:
            while token in self.ends:
                token = (token + 1) % VOCAB_SIZE
        return token


@dataclass
class Slot:
    """The runner's persistent state of a running request."""

    admission: Admission
    oracle: Oracle
    table: list[int] = field(default_factory=list)
    end: int = 0
    """Tokens computed so far, cached ones included."""
    last_sample: int | None = None

    @property
    def request_id(self) -> int:
        return self.admission.request_id


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
        oracles: dict[int, Oracle],
        run_ahead: bool = False,
    ) -> None:
        self.config = config
        self.block_size = block_size
        self.oracles = oracles
        self.run_ahead = run_ahead
        self.kv: list[list[int | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.slots: dict[int, Slot] = {}
        self.sampled: Counter[int] = Counter()
        """Samples drawn per request, over all its admissions."""
        self._in_flight: deque[Step] = deque()
        self._last_step = 0

    def submit(self, plan: SchedulerOutput) -> Step:
        check(len(self._in_flight) <= int(self.run_ahead), "too many steps in flight", plan.step)
        check(plan.step > self._last_step, "steps are numbered upwards", plan.step)
        self._last_step = plan.step
        self._change_slots(plan)
        self._check_shape(plan)
        written = self._write(plan.rows)
        samples = [self._attend(row) for row in plan.rows]
        self._check_decodes_go_on(plan)
        step = Step(plan.step, StepResult(samples), written)
        self._in_flight.append(step)
        return step

    def wait(self, handle: Step) -> StepResult:
        check(self._in_flight.popleft() is handle, "steps are waited for in their order", handle.number)
        return handle.output

    def close(self) -> None:
        """Nothing to free."""

    def fail(self, step: Step) -> None:
        """The step failed: nobody knows what its KV holds, nor what a step behind it computes from that."""
        for spoiled in list(self._in_flight)[self._in_flight.index(step) :]:
            spoiled.output = StepResult([[NONSENSE] if ids else [] for ids in spoiled.output.token_ids])
            for block, offset in spoiled.written:
                self.kv[block][offset] = None
        self._in_flight.remove(step)

    def _change_slots(self, plan: SchedulerOutput) -> None:
        for slot in plan.freed_slots:
            check(slot in self.slots, "a slot is freed that nobody has", slot)
            del self.slots[slot]
        for admission in plan.admissions:
            oracle = self.oracles[admission.request_id]
            check(0 <= admission.slot < self.config.max_num_seqs, "no such slot", admission.slot)
            check(admission.slot not in self.slots, "the slot is taken", admission.slot)
            check(admission.num_prompt_tokens == oracle.num_prompt, "wrong prompt length", admission)
            check(set(admission.end_token_ids) == oracle.ends, "wrong end tokens", admission)
            check(admission.params == oracle.message.params, "wrong params", admission)
            self.slots[admission.slot] = Slot(admission, oracle)
        ids = [slot.request_id for slot in self.slots.values()]
        check(len(set(ids)) == len(ids), "a request has two slots", ids)

    def _check_shape(self, plan: SchedulerOutput) -> None:
        check(bool(plan.rows), "a step without rows", plan.step)
        slots = [row.slot for row in plan.rows]
        check(len(set(slots)) == len(slots), "a slot is in two rows", slots)
        check(plan.num_tokens == sum(row.num_tokens for row in plan.rows), "wrong token count", plan)
        check(plan.num_tokens <= self.config.max_num_batched_tokens, "over budget", plan.num_tokens)

    def _write(self, rows: list[ScheduledRow]) -> list[tuple[int, int]]:
        """Write the KV of all rows, as the real runner does before any row attends."""
        begun = {index for index, slot in self.slots.items() if slot.table}
        for row in rows:
            table = self.slots[row.slot].table
            table += row.new_block_ids
            check(len(set(table)) == len(table), "a block twice in a table", table)
        # A block may be shared by a request that begins in the very step that fills it, never before.
        holders = Counter(block for index in begun for block in self.slots[index].table)
        written = []
        for row in rows:
            slot = self.slots[row.slot]
            self._check_row(row, slot)
            slot.end = row.start + row.num_tokens
            for position in range(row.start, slot.end):
                block, offset = slot.table[position // self.block_size], position % self.block_size
                check(holders[block] == (row.slot in begun), "a shared block is written", row, block)
                self.kv[block][offset] = slot.oracle.chain[position]
                written.append((block, offset))
        check(len(set(written)) == len(written), "two rows write to one place", written)
        return written

    def _check_row(self, row: ScheduledRow, slot: Slot) -> None:
        """Right request, right positions, right tokens, enough blocks."""
        check(slot.request_id == row.request_id, "another request has this slot", row, slot)
        if slot.end == 0:  # the first row after an admission may start behind a cached prefix
            check(row.start % self.block_size == 0, "a partial block was shared", row)
        else:
            check(row.start == slot.end, "positions are skipped or repeated", row, slot.end)
        end = row.start + row.num_tokens
        check(row.num_tokens >= 1 and len(slot.table) * self.block_size >= end, "blocks are missing", row, slot.table)
        known = slot.oracle.num_prompt + self.sampled[row.request_id]
        check(end <= known, "tokens that nobody knows yet", row, known)
        check(row.num_logits == (end == known), "must sample exactly at the last known token", row, known)
        check(end < slot.oracle.limit, "a row after the length limit", row)
        # A decode row brings no token: the runner reads its own last sample.
        tokens = row.token_ids or [slot.last_sample]
        check(tokens == slot.oracle.tokens[row.start : end], "wrong tokens", row, slot.last_sample)

    def _attend(self, row: ScheduledRow) -> list[int]:
        """Check all KV that the row reads; returns its samples."""
        slot = self.slots[row.slot]
        size, chain = self.block_size, slot.oracle.chain
        for index in range(-(-slot.end // size)):
            expected = chain[index * size : min(slot.end, (index + 1) * size)]
            found = self.kv[slot.table[index]][: len(expected)]
            check(found == expected, "wrong or missing KV", row, index, slot.table[index])
        if not row.num_logits:
            return []
        self.sampled[row.request_id] += 1
        slot.last_sample = slot.oracle.sample(slot.end - 1)
        return [slot.last_sample]

    def _check_decodes_go_on(self, plan: SchedulerOutput) -> None:
        """Every request that decodes has a row in every step, unless the sample in flight reaches its limit."""
        chosen = {row.slot for row in plan.rows}
        for index, slot in self.slots.items():
            at_limit = slot.end == slot.oracle.limit - 1
            check(slot.last_sample is None or index in chosen or at_limit, "a decode was left out", slot)


@dataclass
class Ended:
    """How a request ended."""

    reason: FinishReason
    token_ids: list[int]
    output: TokenOutput
    step: int


class MiniEngine:
    """Scheduler, runner, and the engine's loop in both its orders, one step per call and with a clock by hand."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        run_ahead: bool = False,
        caching: bool = True,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 32,
        max_model_len: int | None = None,
        **settings: int,
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=min(num_blocks * block_size, max_model_len or 1 << 30),
            eos_token_ids=EOS,
            **settings,
        )
        self.blocks = BlockManager(num_blocks, block_size, caching)
        self.scheduler = Scheduler(self.config, self.blocks)
        self.oracles: dict[int, Oracle] = {}
        self.runner = FakeRunner(self.config, num_blocks, block_size, self.oracles, run_ahead)
        self.now = 0.0
        self.plans: list[SchedulerOutput] = []
        self.streams: dict[int, list[int]] = {}
        """Tokens per request, as they came out."""
        self.ended: dict[int, Ended] = {}
        self.first_token_step: dict[int, int] = {}
        """How many calls of :meth:`step` had been made when the first token came out."""
        self.steps = 0
        self._in_flight: deque[tuple[SchedulerOutput, Step]] = deque()

    # --- requests ---

    def add(
        self,
        prompt: list[int] | int,
        max_tokens: int | None = 4,
        *,
        priority: int = 0,
        arrival: float | None = None,
        deadline: float | None = None,
        salt: str = "",
        **params: object,
    ) -> int:
        """Queue a request and return its id; an int as prompt gives that many tokens that no other prompt has."""
        request_id = len(self.oracles)
        if isinstance(prompt, int):
            prompt = [1000 * (request_id + 1) + i for i in range(prompt)]
        message = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, **{"ignore_eos": True, **params}),  # type: ignore[arg-type]
            arrival=self.now + request_id * 1e-6 if arrival is None else arrival,
            priority=priority,
            deadline=deadline,
            cache_salt=salt,
        )
        self.oracles[request_id] = Oracle(message, EOS, self.config.max_model_len)
        self.streams[request_id] = []
        self.scheduler.add(message)
        self._collect()
        return request_id

    def abort(self, *request_ids: int) -> None:
        self.scheduler.abort(request_ids)
        self.scheduler.check_integrity()
        self._collect()

    # --- steps ---

    def step(self, fault: str | None = None) -> SchedulerOutput | None:
        """One turn of the loop. ``fault`` makes the runner fail in "submit", or in the "wait" of this turn."""
        self.steps += 1
        plan = self.scheduler.schedule(self.now)
        self.scheduler.check_integrity()
        if plan is not None:
            self.plans.append(plan)
            handle = self.runner.submit(plan)
            if fault == "submit":
                self.runner.fail(handle)
                self.scheduler.fail_step(plan, "broken")
            else:
                self._in_flight.append((plan, handle))
        while len(self._in_flight) > int(self.runner.run_ahead and plan is not None):
            self._finish_step(fault == "wait")
        self.scheduler.check_integrity()
        self._collect()
        return plan

    def _finish_step(self, fault: bool) -> None:
        plan, handle = self._in_flight.popleft()
        if fault:
            self.runner.fail(handle)
            self.scheduler.fail_step(plan, "broken")
        else:
            self.scheduler.update(plan, self.runner.wait(handle), self.now)

    def run(self, max_steps: int = 1000, until: Callable[[], bool] | None = None) -> None:
        """Step until all requests ended, or until a condition holds."""
        for _ in range(max_steps):
            if until() if until else not (self.scheduler.has_requests or self._in_flight):
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def _collect(self) -> None:
        for output in self.scheduler.take_outputs():
            request_id = output.request_id
            check(request_id not in self.ended, "an output after the last one", output)
            self.streams[request_id] += output.token_ids
            if output.token_ids:
                self.first_token_step.setdefault(request_id, self.steps)
            if output.finish_reason is not None:
                self.ended[request_id] = Ended(output.finish_reason, self.streams[request_id], output, self.steps)

    # --- what tests ask ---

    def row(self, request_id: int, plan: SchedulerOutput | None = None) -> ScheduledRow | None:
        """The request's row in a plan, by default the newest."""
        rows = (plan or self.plans[-1]).rows
        return next((row for row in rows if row.request_id == request_id), None)

    def running(self) -> list[int]:
        return sorted(slot.request_id for slot in self.runner.slots.values())

    def check_answers(self) -> None:
        """Every request ended by itself, with the tokens and the reason that its oracle expects."""
        for request_id, oracle in self.oracles.items():
            ended = self.ended[request_id]
            check(ended.token_ids == oracle.generated, "wrong tokens", request_id, ended.token_ids, oracle.generated)
            check(ended.reason == oracle.reason, "wrong reason", request_id, ended.reason, oracle.reason)

    def check_idle(self) -> None:
        """Nothing is held any more."""
        stats = self.scheduler.stats()
        check(stats.running == stats.waiting == 0, "requests are left", stats)
        check(stats.free_blocks == stats.total_blocks == self.blocks.num_blocks, "blocks are lost", stats)
        self.scheduler.check_integrity()
