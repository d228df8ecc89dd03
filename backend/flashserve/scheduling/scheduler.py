"""Continuous batching: which requests get which share of the next step.

One idea, no phases. Each request has ``num_computed_tokens``; a step brings some requests closer to their known
tokens, within a token budget. Decoding is the case in which one token is missing.

Order within a step: every decoding request gets its token; what is left of the budget goes to prefills, those with
the least left to compute first, so that a short prompt never waits for the whole of a long one.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from flashserve.errors import INTERNAL, UNAVAILABLE
from flashserve.protocol import ErrorInfo, FinishReason, GenerateRequest, Stats, TokenOutput
from flashserve.scheduling.block_manager import BlockManager, root_hash
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepResult
from flashserve.scheduling.request import Request
from flashserve.scheduling.waiting_queue import WaitingQueue

MAX_PARTIAL_PREFILLS = 8  # prompts in work at once; each holds its blocks, and more would have to wait for these
PREFILL_ORDER = attrgetter("prefill_order")
NO_IDS: list[int] = []  # shared by all decode rows; rows are frozen, nobody appends


@dataclass(frozen=True)
class SchedulerConfig:
    """The scheduler's limits, all resolved."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    eos_token_ids: tuple[int, ...] = ()
    max_waiting_requests: int = 1024
    max_waiting_tokens: int = 4_194_304
    watermark_blocks: int = 1
    seed: int = 0
    cache_root: str = ""
    """Fingerprint of model, dtype and layout: KV is only shared under the same one."""


class Scheduler:
    """Owns all requests. ``schedule`` and ``update`` alternate; with run-ahead, one step may be in flight.

    A request is in exactly one of: the waiting queue, ``_prefilling``, ``_decoding``; or it has ended.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager) -> None:
        self.config = config
        self.blocks = blocks
        self._requests: dict[int, Request] = {}
        self._waiting = WaitingQueue(config.max_waiting_requests, config.max_waiting_tokens)
        self._prefilling: dict[int, Request] = {}
        self._decoding: dict[int, Request] = {}
        self._deadlines: list[tuple[float, int]] = []
        self._free_slots = list(reversed(range(config.max_num_seqs)))
        self._freed_slots: list[int] = []
        self._outputs: list[TokenOutput] = []
        self._seeds = random.Random(config.seed)
        self._steps = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._cache_queries = self._cache_hits = 0
        self._preemptions = self._prefill_chunks = 0

    # --- requests come and go -----------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    def has_room(self, num_prompt_tokens: int) -> bool:
        """Whether the queue takes one more request of this size."""
        return self._waiting.has_room(num_prompt_tokens)

    def add(self, message: GenerateRequest) -> None:
        """Queue a request, or answer it with UNAVAILABLE when the queue is full."""
        if not self.has_room(len(message.prompt_token_ids)):
            retry = self._waiting.retry_after_ms()
            text = f"the queue is full: {len(self._waiting)} requests with {self._waiting.num_tokens} tokens wait"
            self._outputs.append(
                TokenOutput(message.request_id, NO_IDS, "error", error=ErrorInfo(UNAVAILABLE, text, retry))
            )
            return
        seed = message.params.seed
        request = Request.from_message(
            message,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            eos_token_ids=self.config.eos_token_ids,
            max_model_len=self.config.max_model_len,
            root=root_hash(self.config.cache_root, message.cache_salt),
        )
        self._requests[request.id] = request
        self._waiting.push(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests in whatever state they are. Unknown ids ended already: their outputs are on the way."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, "abort")

    def fail_step(self, plan: SchedulerOutput, message: str) -> None:
        """End the step's requests with INTERNAL, and trust no KV that it or a step behind it wrote.

        Blocks that the step should have filled may already be shared by requests that had no row in it, and a step
        in flight behind it read them: what has a sample in flight ends too, the others are computed anew.
        """
        failed = {row.request_id for row in plan.rows}
        for request in list(self._requests.values()):
            if request.id in failed or (request.slot is not None and request.num_pending):
                self._end(request, "error", error=ErrorInfo(INTERNAL, message))
            elif request.slot is not None:
                self._preempt(request)
        self.blocks.forget_all()

    def take_outputs(self) -> list[TokenOutput]:
        """What happened since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # --- schedule -----------------------------------------------------------------------------------------

    def schedule(self, now: float, prefill_limit: int | None = None) -> SchedulerOutput | None:
        """The next step, or None if nothing can run now. Requests whose deadline has passed end first.

        prefill_limit: prompt tokens, if the step also decodes; None: as many as the budget has.
        """
        self._expire(now)
        rows = self._decode_rows()
        num_decodes = len(rows)
        admissions: list[Admission] = []
        budget = self.config.max_num_batched_tokens - num_decodes
        if prefill_limit is not None and rows:
            budget = min(budget, prefill_limit)
        num_prompt_tokens = budget - self._fill_with_prefills(rows, admissions, budget, now)
        if not rows:
            return None
        self._steps += 1
        freed, self._freed_slots = self._freed_slots, []
        return SchedulerOutput(
            step=self._steps,
            admissions=admissions,
            rows=rows,
            num_tokens=num_decodes + num_prompt_tokens,
            freed_slots=freed,
        )

    def _expire(self, now: float) -> None:
        while self._deadlines and self._deadlines[0][0] <= now:
            _, request_id = heapq.heappop(self._deadlines)
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, "deadline")

    def _decode_rows(self) -> list[ScheduledRow]:
        self._make_room_for_decodes()
        block_size = self.blocks.block_size
        rows = []
        for request in self._decoding.values():
            start = request.num_computed_tokens
            if request.num_pending and request.awaits_last_sample:
                continue
            new_blocks = NO_IDS
            if start == len(request.block_ids) * block_size:
                new_blocks = self.blocks.allocate(1)
                request.block_ids += new_blocks
            request.num_computed_tokens = start + 1
            request.num_pending += 1
            assert request.slot is not None
            rows.append(ScheduledRow(request.id, request.slot, start, 1, NO_IDS, new_blocks, 1))
        return rows

    def _make_room_for_decodes(self) -> None:
        """Preempt until every decoding request that enters a new block can have one.

        The oldest request of the best priority is never the victim of another, and fits alone (max_model_len is
        at most what all blocks hold), so there is always progress.
        """
        block_size = self.blocks.block_size
        needy = {
            r.id
            for r in self._decoding.values()
            if r.num_computed_tokens == len(r.block_ids) * block_size and not r.awaits_last_sample
        }
        while len(needy) > self.blocks.num_free:
            victim = max(
                (r for group in (self._prefilling, self._decoding) for r in group.values()),
                key=lambda r: (r.priority, r.arrival, r.id),
            )
            needy.discard(victim.id)
            self._preempt(victim)

    def _preempt(self, request: Request) -> None:
        """Back to the queue; it is recomputed, through the prefix cache as far as its blocks survive."""
        self._release(request)
        request.num_computed_tokens = 0
        request.passed_over = 0
        request.preemptions += 1
        self._preemptions += 1
        self._waiting.push(request)

    def _fill_with_prefills(
        self, rows: list[ScheduledRow], admissions: list[Admission], budget: int, now: float
    ) -> int:
        """Spend ``budget`` on prompts; returns what is left of it."""
        for request in self._prefilling.values():
            request.passed_over += 1  # until it gets a row
        while budget > 0:
            self._admit_waiting(admissions, now)
            if not self._prefilling:
                break
            request = min(self._prefilling.values(), key=PREFILL_ORDER)
            if request.unsent_block_ids:
                self._share_late(request)
            count = min(budget, request.num_remaining)
            rows.append(self._prefill_row(request, count))
            budget -= count
        return budget

    def _admit_waiting(self, admissions: list[Admission], now: float) -> None:
        while self._free_slots:
            request = self._waiting.head()
            if request is None or request.num_pending:  # a preempted one whose last sample is still in flight
                return
            if len(self._prefilling) >= MAX_PARTIAL_PREFILLS:
                first = min(self._prefilling.values(), key=PREFILL_ORDER)
                if request.prefill_order >= first.prefill_order:
                    return  # it would not get a row before them
            cached = self._cached_prefix(request)
            total = -(-len(request.token_ids) // self.blocks.block_size)
            missing = total - len(cached)
            left = self.blocks.num_free - self.blocks.count_free(cached) - missing
            if left < self.config.watermark_blocks and (self._prefilling or self._decoding or left < 0):
                return
            self._waiting.admit_head(now)
            self._start(request, cached, missing, now)
            admissions.append(request.admission())

    def _cached_prefix(self, request: Request) -> list[int]:
        """Cached blocks of the known tokens, short of the last token: its logits are needed."""
        if not self.blocks.enable_prefix_caching:
            return []
        block_size = self.blocks.block_size
        return self.blocks.find_prefix(request.hash_blocks((len(request.token_ids) - 1) // block_size, block_size))

    def _start(self, request: Request, cached: list[int], missing: int, now: float) -> None:
        self.blocks.acquire(cached)
        # A prompt gets all its blocks now, so that a prefill never waits for memory half-way.
        request.block_ids = cached + self.blocks.allocate(missing)
        request.unsent_block_ids = list(request.block_ids)
        request.num_computed_tokens = len(cached) * self.blocks.block_size
        request.slot = self._free_slots.pop()
        request.passed_over = 1  # in this step, unless it gets a row
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.cached_tokens = request.num_computed_tokens
            if self.blocks.enable_prefix_caching:
                self._cache_queries += request.num_prompt_tokens
                self._cache_hits += request.cached_tokens
        self._prefilling[request.id] = request

    def _share_late(self, request: Request) -> None:
        """Before its first row: share what others computed since its admission.

        Requests that arrive together are admitted together; without this, a burst with one system prompt would
        compute it up to MAX_PARTIAL_PREFILLS times.
        """
        block_size = self.blocks.block_size
        first = request.num_computed_tokens // block_size
        found = self._cached_prefix(request)[first:]
        last = first + len(found)
        self.blocks.acquire(found)
        self.blocks.release(request.block_ids[first:last])
        request.block_ids[first:last] = found
        request.unsent_block_ids = list(request.block_ids)
        request.num_computed_tokens = last * block_size
        if request.preemptions == 0:
            request.cached_tokens += len(found) * block_size
            self._cache_hits += len(found) * block_size

    def _prefill_row(self, request: Request, count: int) -> ScheduledRow:
        start = request.num_computed_tokens
        end = start + count
        assert request.slot is not None
        new_blocks, request.unsent_block_ids = request.unsent_block_ids, NO_IDS
        request.passed_over = 0
        request.num_computed_tokens = end
        self._register_blocks(request, start, end)
        is_last = end == len(request.token_ids)
        if is_last:
            request.num_pending += 1
            del self._prefilling[request.id]
            self._decoding[request.id] = request
        else:
            self._prefill_chunks += 1
        known = request.token_ids[start:end]
        return ScheduledRow(request.id, request.slot, start, count, known, new_blocks, int(is_last))

    # --- update -------------------------------------------------------------------------------------------

    def update(self, plan: SchedulerOutput, output: StepResult, now: float) -> None:
        """Take in the samples of a step: append, check for the end, report."""
        block_size = self.blocks.block_size
        outputs = self._outputs
        for row, token_ids in zip(plan.rows, output.token_ids, strict=True):
            if not token_ids:
                continue
            request = self._requests.get(row.request_id)
            if request is None:
                continue  # it ended while the step ran
            request.num_pending -= 1
            taken, reason = request.take(token_ids)
            request.last_token = now
            self._generation_tokens += len(taken)
            timings = None
            if request.first_token is None:
                request.first_token = now
                self._prompt_tokens += request.num_prompt_tokens
                timings = request.timings()
            if request.slot is not None and row.is_decode and (row.start + 1) % block_size == 0:
                self._register_blocks(request, row.start, row.start + 1)
            if reason is None:
                outputs.append(TokenOutput(row.request_id, taken, None, timings))
            else:
                self._end(request, reason, taken)

    def _register_blocks(self, request: Request, start: int, end: int) -> None:
        """Make the blocks findable that computing tokens ``start .. end - 1`` fills.

        Done when the step is planned: a row of the same step may already read them, since the runner writes the
        KV of all rows before any row attends.
        """
        block_size = self.blocks.block_size
        first, last = start // block_size, end // block_size
        if not self.blocks.enable_prefix_caching or first == last:
            return
        hashes = request.hash_blocks(last, block_size)
        for index in range(first, last):
            self.blocks.register(request.block_ids[index], hashes[index])

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        token_ids: list[int] = NO_IDS,
        error: ErrorInfo | None = None,
    ) -> None:
        """The one way a request ends: everything it holds goes back, and its last output goes out."""
        if request.slot is None:
            self._waiting.remove(request)
        else:
            self._release(request)
        del self._requests[request.id]
        if len(self._deadlines) > 64 + 2 * len(self._requests):  # most requests end long before their deadline
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._requests]
            heapq.heapify(self._deadlines)
        self._outputs.append(TokenOutput(request.id, token_ids, reason, request.timings(), error))

    def _release(self, request: Request) -> None:
        """A running request gives back its slot and its blocks."""
        assert request.slot is not None
        self._prefilling.pop(request.id, None)
        self._decoding.pop(request.id, None)
        self.blocks.release(request.block_ids)
        request.block_ids = []
        self._free_slots.append(request.slot)
        self._freed_slots.append(request.slot)
        request.slot = None

    # --- what others see ----------------------------------------------------------------------------------

    def stats(self) -> Stats:
        return Stats(
            running=len(self._prefilling) + len(self._decoding),
            waiting=len(self._waiting),
            free_blocks=self.blocks.num_free,
            total_blocks=self.blocks.num_blocks,
            steps=self._steps,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            prefix_cache_queries=self._cache_queries,
            prefix_cache_hits=self._cache_hits,
            preemptions=self._preemptions,
            prefill_chunks=self._prefill_chunks,
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if a request, slot or block is lost or in two places (for tests; linear time)."""
        running = [*self._prefilling.values(), *self._decoding.values()]
        ids = sorted([r.id for r in running] + [r.id for r in self._waiting])
        if ids != sorted(self._requests):
            raise RuntimeError(f"requests {ids} are queued or running, {sorted(self._requests)} are known")
        slots = [r.slot for r in running if r.slot is not None]
        if len(slots) != len(running) or sorted([*slots, *self._free_slots]) != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"slots {slots} are taken and {self._free_slots} are free")
        self.blocks.check_integrity(r.block_ids for r in running)
        if any(r.block_ids for r in self._waiting):
            raise RuntimeError("a waiting request holds blocks")
