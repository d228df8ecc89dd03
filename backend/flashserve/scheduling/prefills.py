"""The prompts' share of a step: who is admitted, whose prompt goes on, and by how much."""

from __future__ import annotations

from flashserve.scheduling.admission import PREFILL_ORDER, AdmissionControl
from flashserve.scheduling.counters import Counters
from flashserve.scheduling.output import MAX_SCORED_TOKENS, Admission, ScheduledRow
from flashserve.scheduling.request import Request
from flashserve.scheduling.request_table import RequestTable
from flashserve.scheduling.running import NO_IDS, RunningSequences
from flashserve.scheduling.sequence import Sequence


class Prefills:
    """Spends a budget of tokens on prompts, those with the least left to compute first."""

    def __init__(
        self, requests: RequestTable, running: RunningSequences, admission: AdmissionControl, counters: Counters
    ) -> None:
        self._requests = requests
        self._running = running
        self._admission = admission
        self._counters = counters

    def fill(self, rows: list[ScheduledRow], admissions: list[Admission], budget: int, now: float) -> int:
        """Spend ``budget`` on prompts; returns what is left of it."""
        prefilling, scores_left = self._running.prefilling, MAX_SCORED_TOKENS
        for sequence in prefilling.values():
            sequence.passed_over += 1  # until it gets a row
        while budget > 0:
            while (admitted := self._admission.admit(now)) is not None:
                admissions += admitted.admissions()
                self._note_admission(admitted, now)
            ready = [s for s in prefilling.values() if scores_left or not s.wants_scores]
            if not ready:
                break
            sequence = min(ready, key=PREFILL_ORDER)
            request = self._requests[sequence.terms.request_id]
            if sequence.unsent_block_ids:
                gained = self._running.share_late(sequence)
                if request.preemptions == 0:
                    request.cached_tokens += gained
                    self._counters.prefix_cache_hits += gained
            count = min(budget, sequence.num_remaining)
            if sequence.wants_scores:
                count = min(count, scores_left)
                scores_left -= count
            self._add_row(rows, request, sequence, count)
            budget -= count
        return budget

    def _note_admission(self, request: Request, now: float) -> None:
        if request.first_scheduled is None:
            request.first_scheduled = now
            request.cached_tokens = request.sequences[0].num_computed_tokens
            if self._running.blocks.enable_prefix_caching and request.terms.reads_cache:
                self._counters.prefix_cache_queries += request.terms.num_prompt_tokens
                self._counters.prefix_cache_hits += request.cached_tokens

    def _add_row(self, rows: list[ScheduledRow], request: Request, sequence: Sequence, count: int) -> None:
        """Plan the next ``count`` tokens; with the last known one come the forks of a group that begins."""
        running, slot = self._running, sequence.slot
        assert slot is not None
        start = sequence.num_computed_tokens
        end = start + count
        new_blocks, sequence.unsent_block_ids = sequence.unsent_block_ids, NO_IDS
        sequence.passed_over = 0
        sequence.num_computed_tokens = end
        running.register(sequence, start, end)
        is_last = end == len(sequence.token_ids)
        pooled = None if request.pooled is None else request.pooled.rows_of(start, end)
        scored, first = sequence.score(start, end) if sequence.wants_scores else (NO_IDS, 0)
        rows.append(
            ScheduledRow(
                request.id,
                slot,
                start,
                count,
                token_ids=sequence.token_ids[start:end],
                new_block_ids=new_blocks,
                num_logits=int(is_last and request.pooled is None),
                index=sequence.index,
                scored=scored,
                first_scored=first,
                pooled=pooled,
            )
        )
        sequence.num_pending += bool(is_last or scored or pooled is not None)
        if not is_last:
            self._counters.prefill_chunks += 1
            return
        del running.prefilling[slot]
        if len(request.sequences) > 1:
            rows += [running.fork(sequence, child) for child in request.live if not child.token_ids]
        running.decoding[slot] = sequence
