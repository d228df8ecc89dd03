"""The step loop without any process around it: schedule, run, update."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from flashserve.config import ResolvedConfig
from flashserve.engine.grammar.matcher import AllowedTokens
from flashserve.engine.grammar.service import HOLD, Grammars
from flashserve.engine.pacing import PrefillPacing
from flashserve.engine.timeline import Timeline
from flashserve.protocol import Abort, ErrorInfo, GenerateRequest, StepOutputs, StubMessage
from flashserve.runner.base import Runner
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.output import SchedulerOutput
from flashserve.scheduling.scheduler import Scheduler

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3  # in a row; then the device is taken for broken and the engine gives up


class EngineBroken(Exception):
    """Several steps in a row failed; only a new process can help."""


class EngineCore:
    """Drives a scheduler and a runner. Single-threaded: its caller is the engine's only thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float] = time.monotonic,
        pacing: PrefillPacing | None = None,
        timeline: Timeline | None = None,
        grammars: Grammars | None = None,
    ) -> None:
        """pacing: for engines whose users wait for single tokens.
        grammars: for requests with structured outputs."""
        self.scheduler = scheduler
        self.pacing = pacing
        self.timeline = timeline
        self._runner = runner
        self._grammars = grammars
        self._clock = clock
        self._in_flight: deque[tuple[SchedulerOutput, Any]] = deque()
        self._failed_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_requests

    @property
    def is_held(self) -> bool:
        """Whether nothing runs and every request waits for something outside the engine: a step would do nothing."""
        return not self._in_flight and self.scheduler.is_held

    def handle(self, message: StubMessage) -> None:
        """Take in a message from the stub."""
        if isinstance(message, GenerateRequest):
            self._add(message)
        elif isinstance(message, Abort):
            self.scheduler.abort(message.request_ids)
            for request_id, index in message.samples:
                self.scheduler.abort_sample(request_id, index)

    def _add(self, message: GenerateRequest) -> None:
        wanted, allowed = message.params.structured_outputs, message.params.allowed_token_ids
        if wanted is None:
            self.scheduler.add(message, matcher=AllowedTokens(allowed) if allowed else None)
            return
        assert self._grammars is not None
        matcher = self._grammars.find(wanted)
        if self.scheduler.add(message, () if matcher else (HOLD,), matcher) and matcher is None:
            self._grammars.request(message.request_id, wanted)

    def _take_grammars(self) -> None:
        """Let requests run whose grammars have been compiled."""
        if self._grammars is None:
            return
        for request_id, outcome in self._grammars.take_ready():
            if isinstance(outcome, ErrorInfo):
                self.scheduler.refuse(request_id, outcome)
            else:
                self.scheduler.release(request_id, HOLD, outcome)

    def step(self) -> StepOutputs:
        """Run one step, or finish the one in flight; with run-ahead the next is submitted before that.

        Raises EngineBroken after repeated faults of the runner.
        """
        self._take_grammars()
        started = self._clock()
        limit = self.pacing.limit() if self.pacing is not None else None
        plan = self.scheduler.schedule(started, limit)
        if plan is not None:
            self._guarded(plan, lambda: self._in_flight.append((plan, self._runner.submit(plan))))
        ahead = 1 if self._runner.run_ahead and plan is not None else 0
        while len(self._in_flight) > ahead:
            oldest, handle = self._in_flight.popleft()
            self._guarded(oldest, lambda: self._finish(oldest, handle))  # noqa: B023 - called at once
        ended = self._clock()
        if self.pacing is not None and plan is not None and not self._runner.run_ahead:
            self.pacing.observe(plan, ended - started)
        outputs = StepOutputs(self.scheduler.take_outputs(), self.scheduler.stats())
        if self.timeline is not None:
            self.timeline.add_ends(outputs.outputs)
            if plan is not None:
                self.timeline.add_step(plan, started, ended, outputs.stats)
        return outputs

    def close(self) -> None:
        """Free the device. Idempotent."""
        if self._grammars is not None:
            self._grammars.close()
        self._runner.close()

    def _finish(self, plan: SchedulerOutput, handle: Any) -> None:
        output = self._runner.wait(handle)
        if self.pacing is not None and output.device_s is not None:
            self.pacing.observe(plan, output.device_s)
        self.scheduler.update(plan, output, self._clock())
        self._failed_steps = 0

    def _guarded(self, plan: SchedulerOutput, action: Callable[[], None]) -> None:
        """Run ``action``; a fault ends the step's requests, not the engine."""
        try:
            action()
        except Exception as error:
            ids = [row.request_id for row in plan.rows]
            log.exception("step %d failed; its requests end with INTERNAL: %s", plan.step, ids)
            self.scheduler.fail_step(plan, "the engine failed while it computed this request")
            self._failed_steps += 1
            if self._failed_steps >= MAX_FAILED_STEPS:
                raise EngineBroken(f"{self._failed_steps} steps in a row failed") from error


def build_core(resolved: ResolvedConfig, runner: Runner, cache_root: str) -> EngineCore:
    """The engine for a loaded model. ``cache_root`` is the model's fingerprint, for the prefix cache."""
    config = resolved.config
    blocks = BlockManager(resolved.num_blocks, resolved.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=resolved.max_num_seqs,
            max_num_batched_tokens=resolved.max_num_batched_tokens,
            max_model_len=resolved.max_model_len,
            eos_token_ids=resolved.model.eos_token_ids,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            watermark_blocks=int(resolved.num_blocks * config.watermark),
            seed=config.seed,
            cache_root=cache_root,
        ),
        blocks,
    )
    model = resolved.model
    return EngineCore(scheduler, runner, grammars=Grammars(model.card, model.vocab_size, model.eos_token_ids))
