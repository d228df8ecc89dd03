"""Continuous batching: which sequences get which share of the next step.

One idea, no phases. Each sequence has ``num_computed_tokens``; a step brings some sequences closer to their known
tokens, within a token budget. Decoding is the case in which one token is missing.

Order within a step: every decoding sequence gets its token; what is left of the budget goes to prefills, those with
the least left to compute first, so that a short prompt never waits for the whole of a long one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Protocol

import msgspec

from flashserve.errors import INTERNAL, INVALID_ARG
from flashserve.protocol import ErrorInfo, FinishReason, GenerateRequest, Logprobs, RequestTimings, Stats, TokenOutput
from flashserve.scheduling.admission import AdmissionControl
from flashserve.scheduling.block_manager import BlockManager, root_hash
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.counters import Counters
from flashserve.scheduling.matcher import Matcher
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput, StepResult
from flashserve.scheduling.prefills import Prefills
from flashserve.scheduling.request import Hold, Request
from flashserve.scheduling.request_table import RequestTable
from flashserve.scheduling.running import NO_IDS, RunningSequences
from flashserve.scheduling.sequence import Sequence

NO_MASKS: list[tuple[int, bytes]] = []
NOTHING_ALLOWED = ErrorInfo(
    INVALID_ARG, "no token was left to choose: the request's structured_outputs and its other parameters rule out all"
)


class Drafter(Protocol):
    """Guesses how texts go on."""

    def draft(self, token_ids: list[int], limit: int) -> list[int]:
        """Up to ``limit`` tokens that may follow; none where it knows nothing."""
        ...


class Scheduler:
    """Owns all requests. ``schedule`` and ``update`` alternate; with run-ahead, one step may be in flight.

    A request is in the waiting queue, or its sequences run, or it has ended.
    """

    def __init__(self, config: SchedulerConfig, blocks: BlockManager, drafter: Drafter | None = None) -> None:
        """drafter: for a runner that checks drafts."""
        self.config = config
        self.blocks = blocks
        self._drafter = drafter
        self._counters = Counters()
        self._requests = RequestTable()
        self._running = RunningSequences(config.max_num_seqs, blocks)
        self._admission = AdmissionControl(config, self._running)
        self._waiting = self._admission.waiting
        self._prefills = Prefills(self._requests, self._running, self._admission, self._counters)
        self._outputs: list[TokenOutput] = []
        self._seeds = random.Random(config.seed)

    # --- requests come and go -----------------------------------------------------------------------------

    @property
    def has_requests(self) -> bool:
        return bool(self._requests)

    @property
    def is_held(self) -> bool:
        """Whether every request that there is waits for something outside the engine."""
        return all(request.holds for request in self._requests)

    def has_room(self, num_prompt_tokens: int) -> bool:
        """Whether the queue takes one more request of this size."""
        return self._waiting.has_room(num_prompt_tokens)

    def add(self, message: GenerateRequest, holds: Iterable[Hold] = (), matcher: Matcher | None = None) -> bool:
        """Queue a request. It is answered with UNAVAILABLE when the queue is full, and with INVALID_ARG if its samples
        could never run together; then the result is False. holds: what :meth:`release` must name before it runs.
        matcher: which tokens it may choose, if not all."""
        refusal = self._admission.refusal(message)
        if refusal is not None:
            ends = range(message.params.n)
            self._outputs += [TokenOutput(message.request_id, NO_IDS, "error", None, refusal, index) for index in ends]
            return False
        seed = message.params.seed
        request = Request.from_message(
            message,
            seed=self._seeds.getrandbits(63) if seed is None else seed,
            eos_token_ids=self.config.eos_token_ids,
            max_model_len=self.config.max_model_len,
            root=root_hash(self.config.cache_root, message.cache_salt),
            holds=holds,
        )
        self._requests.add(request)
        self._waiting.push(request)
        if matcher is not None:
            self._constrain(request, matcher)
        return True

    def release(self, request_id: int, hold: Hold, matcher: Matcher | None = None) -> None:
        """What a request waited for is there, such as its matcher. Unknown ids ended already; what it does not wait for
        changes nothing."""
        request = self._requests.get(request_id)
        if request is not None and hold in request.holds:
            self._waiting.release(request, hold)
            if matcher is not None:
                self._constrain(request, matcher)

    def refuse(self, request_id: int, error: ErrorInfo) -> None:
        """What a request waited for will never be there."""
        request = self._requests.get(request_id)
        if request is not None:
            self._end(request, "error", error)

    def _constrain(self, request: Request, matcher: Matcher) -> None:
        """Let it keep to what the matcher says, if it has the room for that."""
        self._requests.constrain(request, matcher)
        room = request.terms.max_total_tokens - request.terms.num_prompt_tokens
        if matcher.least_tokens > room:
            text = f"close_json: the shortest text found of this form takes {matcher.least_tokens} tokens, of {room}"
            self._end(request, "error", ErrorInfo(INVALID_ARG, text))

    def abort(self, request_ids: Iterable[int]) -> None:
        """End requests in whatever state they are. Unknown ids ended already: their outputs are on the way."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._end(request, "abort")

    def abort_sample(self, request_id: int, index: int) -> None:
        """End one sequence of a request that has given tokens; the others go on."""
        request = self._requests.get(request_id)
        if request is not None and request.sequences[index].finish_reason is None:
            self._end_sequence(request, request.sequences[index], "abort")

    def fail_step(self, plan: SchedulerOutput, message: str) -> None:
        """End the step's requests with INTERNAL, and trust no KV that it or a step behind it wrote.

        Blocks that the step should have filled may already be shared by requests that had no row in it, and a step
        in flight behind it read them: what has a sample in flight ends too, the others are computed anew.
        """
        failed = {row.request_id for row in plan.rows}
        for request in list(self._requests):
            waits = request in self._waiting
            if request.id in failed or (not waits and request.num_pending):
                self._end(request, "error", ErrorInfo(INTERNAL, message))
            elif not waits:
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
        for request in self._requests.take_expired(now):
            self._end(request, "deadline")
        rows: list[ScheduledRow] = []
        num_decode_tokens = self._add_decode_rows(rows)
        admissions: list[Admission] = []
        budget = self.config.max_num_batched_tokens - num_decode_tokens
        if prefill_limit is not None and rows:
            budget = min(budget, prefill_limit)
        num_decode_rows = len(rows)
        num_prompt_tokens = budget - self._prefills.fill(rows, admissions, budget, now)
        if not rows:
            return None
        self._counters.steps += 1
        freed, copies = self._running.take_changes()
        return SchedulerOutput(
            step=self._counters.steps,
            admissions=admissions,
            rows=rows,
            num_tokens=num_decode_tokens + num_prompt_tokens,
            freed_slots=freed,
            block_copies=copies,
            pools=self._requests.num_pooled > 0 and any(row.pooled is not None for row in rows),
            num_scored=sum(len(row.scored) for row in rows[num_decode_rows:]),
            token_masks=self._token_masks(rows) if self._requests.num_constrained else NO_MASKS,
        )

    def _token_masks(self, rows: list[ScheduledRow]) -> list[tuple[int, bytes]]:
        """Of the rows that sample for a constrained sequence. All its samples are known, or its mask is constant."""
        masks = []
        for index, row in enumerate(rows):
            matcher = self._requests[row.request_id].sequences[row.index].matcher if row.num_logits else None
            if matcher is not None:
                masks.append((index, matcher.mask()))
        return masks

    def _add_decode_rows(self, rows: list[ScheduledRow]) -> int:
        """A row for every decoding sequence; returns their tokens. Drafts and forced tokens take what is left."""
        spare_blocks = self._make_room_for_decodes()
        running, has_drafter = self._running, self._drafter is not None
        tokens_left = most = self.config.max_num_batched_tokens - len(running.decoding)
        for slot, sequence in running.decoding.items():
            if sequence.num_pending and (has_drafter or sequence.awaits_sample):
                continue  # what is in flight would be drafted on, or must be known first
            terms, index = sequence.terms, sequence.index
            start = sequence.num_computed_tokens
            new_blocks = running.grow(sequence) if start == sequence.writable_end else NO_IDS
            token_ids, count, num_logits = NO_IDS, 1, 1
            if sequence.needs_known_tokens:
                token_ids, more_blocks = running.bring_known(sequence, 1 + tokens_left, spare_blocks)
                new_blocks = new_blocks + more_blocks
                spare_blocks -= len(more_blocks)
                count = len(token_ids)
                tokens_left -= count - 1
                num_logits = int(count == sequence.num_remaining)
            elif has_drafter and sequence.matcher is None and (drafts := self._draft(sequence, tokens_left)):
                token_ids = [sequence.token_ids[-1], *drafts]
                count = num_logits = len(token_ids)
                tokens_left -= len(drafts)
            sequence.num_computed_tokens = start + count
            if num_logits:
                sequence.num_pending += 1
            rows.append(ScheduledRow(terms.request_id, slot, start, count, token_ids, new_blocks, num_logits, index))
        return len(rows) + most - tokens_left

    def _draft(self, sequence: Sequence, limit: int) -> list[int]:
        """Drafts that stay within the sequence's blocks and below its length limit: they cost nobody memory."""
        assert self._drafter is not None
        room = sequence.writable_end - sequence.num_computed_tokens - 1
        limit = min(limit, room, sequence.terms.max_total_tokens - len(sequence.token_ids) - 1)
        return self._drafter.draft(sequence.token_ids, limit) if limit > 0 else []

    def _make_room_for_decodes(self) -> int:
        """Preempt until every decoding sequence that enters a new block, or needs its own copy of one, can have it;
        returns how many are free beyond those.

        The oldest request of the best priority is never the victim of another, and fits alone (max_model_len is
        at most what all blocks hold, and see ``AdmissionControl.refusal``), so there is always progress.
        """
        running = self._running
        needy = [
            s for s in running.decoding.values() if s.num_computed_tokens == s.writable_end and not s.awaits_last_sample
        ]
        while len(needy) > self.blocks.num_free and running.num_missing(needy) > self.blocks.num_free:
            victim = max(running, key=lambda s: (s.terms.priority, s.terms.arrival, s.terms.request_id)).terms
            needy = [sequence for sequence in needy if sequence.terms is not victim]
            self._preempt(self._requests[victim.request_id])
        return self.blocks.num_free - len(needy)

    def _preempt(self, request: Request) -> None:
        """Back to the queue, all sequences; they are recomputed, through the prefix cache as far as blocks survive."""
        for sequence in request.live:
            self._running.release(sequence)
        request.preemptions += 1
        self._counters.preemptions += 1
        self._waiting.push(request)

    # --- update -------------------------------------------------------------------------------------------

    def update(self, plan: SchedulerOutput, output: StepResult, now: float) -> None:
        """Take in the samples of a step: append, check for the end, report."""
        find, outputs, block_size = self._requests.get, self._outputs, self.blocks.block_size
        has_logprobs = bool(output.logprobs or output.prompt_logprobs)
        num_generated = 0
        if output.pooled:
            self._take_pooled(plan, output, now)
        for place, (row, token_ids) in enumerate(zip(plan.rows, output.token_ids, strict=True)):
            if not token_ids:
                self._take_part(row, output, place, now)
                continue
            request = find(row.request_id)
            if request is None:
                continue  # it ended while the step ran
            sequence = request.sequences[row.index]
            if sequence.finish_reason is not None:
                continue
            sequence.num_pending -= 1
            taken, reason = sequence.take(token_ids)
            request.last_token = now
            num_generated += len(taken)
            timings = self._begin_output(request, row, now) if request.first_token is None else None
            if sequence.slot is not None:
                if row.num_logits > 1:
                    self._settle(sequence, row)
                elif (row.start + 1) % block_size == 0 and row.is_decode:
                    self._running.register(sequence, row.start, row.start + 1)
            logprobs = output.logprobs_of(place) if has_logprobs else None
            if reason is None:
                outputs.append(TokenOutput(row.request_id, taken, None, timings, None, row.index, logprobs))
            else:
                error = NOTHING_ALLOWED if reason == "error" else None
                self._end_sequence(request, sequence, reason, taken, error, logprobs)
        self._counters.generation_tokens += num_generated

    def _take_part(self, row: ScheduledRow, output: StepResult, place: int, now: float) -> None:
        """Take in a row without samples, a part of a prompt: how far it is, how probable its tokens are."""
        if self._requests.num_with_progress:
            self._report_progress(row, now)
        request = self._requests.get(row.request_id) if row.scored else None
        if request is None or request.sequences[row.index].finish_reason is not None:
            return
        request.sequences[row.index].num_pending -= 1
        logprobs = output.logprobs_of(place)
        self._outputs.append(TokenOutput(row.request_id, NO_IDS, None, None, None, row.index, logprobs))

    def _begin_output(self, request: Request, row: ScheduledRow, now: float) -> RequestTimings:
        """Note a request's first token."""
        if self._requests.num_with_progress:
            self._report_progress(row, now)
        request.first_token = now
        self._counters.prompt_tokens += request.terms.num_prompt_tokens
        return request.timings()

    def _report_progress(self, row: ScheduledRow, now: float) -> None:
        """Say how far a prompt is, if its request asks for that and has no token yet."""
        request = self._requests.get(row.request_id)
        if request is None or not request.return_progress or request.first_token is not None:
            return
        progress = request.progress(row.start + row.num_tokens, now)
        self._outputs.append(TokenOutput(request.id, NO_IDS, progress=progress))

    def _take_pooled(self, plan: SchedulerOutput, output: StepResult, now: float) -> None:
        """Take in sums of hidden states; a request ends with its prompt's last."""
        for index, total in output.pooled.items():
            row = plan.rows[index]
            request = self._requests.get(row.request_id)
            if request is None:
                continue
            assert request.pooled is not None
            sequence = request.sequences[0]
            sequence.num_pending -= 1
            request.pooled.add(total, row.start)
            if row.start + row.num_tokens == request.terms.num_prompt_tokens:
                request.first_token = request.last_token = now
                self._counters.prompt_tokens += request.terms.num_prompt_tokens
                self._end_sequence(request, sequence, "stop")

    def _settle(self, sequence: Sequence, row: ScheduledRow) -> None:
        """Of a row with drafts counts what was right: the last token is never computed yet."""
        end = min(row.start + row.num_tokens, len(sequence.token_ids) - 1)
        sequence.num_computed_tokens = end
        self._running.register(sequence, row.start, end)

    def _end(self, request: Request, reason: FinishReason, error: ErrorInfo | None = None) -> None:
        """End whatever of a request has not ended."""
        for sequence in request.live:
            self._end_sequence(request, sequence, reason, error=error)

    def _end_sequence(
        self,
        request: Request,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: list[int] = NO_IDS,
        error: ErrorInfo | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """The one way a sequence ends: everything it holds goes back, and its last output goes out."""
        if sequence.slot is not None:
            self._running.release(sequence)
        sequence.finish_reason = reason
        embedding = request.pooled.embedding() if request.pooled is not None and reason == "stop" else None
        timings = request.timings()
        self._outputs.append(
            TokenOutput(request.id, token_ids, reason, timings, error, sequence.index, logprobs, embedding)
        )
        if not request.live:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        self._requests.remove(request)

    # --- what others see ----------------------------------------------------------------------------------

    def stats(self) -> Stats:
        return Stats(
            running=len(self._requests) - len(self._waiting),
            waiting=len(self._waiting),
            free_blocks=self.blocks.num_free,
            total_blocks=self.blocks.num_blocks,
            **msgspec.structs.asdict(self._counters),
        )

    def check_integrity(self) -> None:
        """Raise RuntimeError if a request, slot or block is lost or in two places (for tests; linear time)."""
        running = {sequence.terms.request_id for sequence in self._running}
        self._requests.check_integrity([*running, *(request.id for request in self._waiting)])
        sequences = [sequence for request in self._requests for sequence in request.sequences]
        self._running.check_integrity(sequences)
        idle = [s for s in sequences if s.slot is None]
        if any(s.block_ids for s in idle) or any(s.slot is not None for r in self._waiting for s in r.sequences):
            raise RuntimeError("what does not run holds a slot or blocks")
