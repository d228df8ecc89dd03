"""Who may come in, and who is next: the waiting queue, and what a request must find free before it runs."""

from __future__ import annotations

from operator import attrgetter

from flashserve.errors import INVALID_ARG, UNAVAILABLE
from flashserve.protocol import ErrorInfo, GenerateRequest
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.request import Request, max_total_tokens
from flashserve.scheduling.running import RunningSequences
from flashserve.scheduling.waiting_queue import WaitingQueue

MAX_PARTIAL_PREFILLS = 8  # prompts in work at once; each holds its blocks, and more would have to wait for these
PREFILL_ORDER = attrgetter("prefill_order")


class AdmissionControl:
    """Moves requests from the waiting queue to those that run."""

    def __init__(self, config: SchedulerConfig, running: RunningSequences) -> None:
        self.waiting = WaitingQueue(config.max_waiting_requests, config.max_waiting_tokens)
        self._config = config
        self._running = running

    def refusal(self, message: GenerateRequest) -> ErrorInfo | None:
        """Why a new request cannot be taken, if it cannot."""
        config, count = self._config, message.params.n
        if not self.waiting.has_room(len(message.prompt_token_ids)):
            retry = self.waiting.retry_after_ms()
            text = f"the queue is full: {len(self.waiting)} requests with {self.waiting.num_tokens} tokens wait"
            return ErrorInfo(UNAVAILABLE, text, retry)
        if count == 1:
            return None
        # Without this, a preempted group might never fit again: its sequences share no more than the cache still has.
        blocks, tokens = self._running.blocks, max_total_tokens(message, config.max_model_len)
        most = min(config.max_num_seqs, blocks.num_blocks // -(-tokens // blocks.block_size))
        if count > most:
            return ErrorInfo(INVALID_ARG, f"n={count} samples of up to {tokens} tokens do not fit: at most {most} do")
        return None

    def admit(self, now: float) -> Request | None:
        """Start the next request, if there is one and there is room for all of its sequences."""
        running, blocks = self._running, self._running.blocks
        request = self.waiting.head() if running.num_free_slots else None
        if request is None or request.num_pending:  # a preempted one whose last sample is still in flight
            return None
        live = request.live
        if len(live) > running.num_free_slots:
            return None
        begun = [sequence for sequence in live if sequence.token_ids]  # else it is to fork off the first one
        if len(running.prefilling) >= MAX_PARTIAL_PREFILLS:
            first = min(running.prefilling.values(), key=PREFILL_ORDER)
            if min(map(PREFILL_ORDER, begun)) >= first.prefill_order:
                return None  # it would not get a row before them
        cached = [running.find_cached(sequence) for sequence in begun]
        missing = [-(-len(s.token_ids) // blocks.block_size) - len(c) for s, c in zip(begun, cached, strict=True)]
        # Whoever forks off writes to a block of its own at once.
        needed = blocks.count_free(set().union(*cached)) + sum(missing) + len(live) - len(begun)
        left = blocks.num_free - needed
        if left < self._config.watermark_blocks and (running.prefilling or running.decoding or left < 0):
            return None
        self.waiting.admit_head(now)
        for found in cached:  # of all sequences, before any is given what might be another's
            blocks.acquire(found)
        for sequence, found, count in zip(begun, cached, missing, strict=True):
            running.start(sequence, found, count)
        for sequence in live[len(begun) :]:
            running.reserve(sequence)
        return request
