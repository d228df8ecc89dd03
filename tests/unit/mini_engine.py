"""The engine core on a runner that checks every plan, one step per call and with a clock by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fake_runner import FakeRunner
from oracle import EOS, FakeDrafter, Forcing, Name, Oracle, check, name_of

from flashserve.engine.core import EngineCore
from flashserve.errors import INTERNAL
from flashserve.protocol import (
    Abort,
    FinishReason,
    GenerateRequest,
    Pooling,
    PoolingParams,
    SamplingParams,
    TokenOutput,
)
from flashserve.scheduling.block_manager import BlockManager
from flashserve.scheduling.config import SchedulerConfig
from flashserve.scheduling.output import ScheduledRow, SchedulerOutput
from flashserve.scheduling.scheduler import Scheduler


@dataclass
class Ended:
    """How a request ended."""

    reason: FinishReason
    token_ids: list[int]
    output: TokenOutput
    step: int


class MiniEngine:
    """Takes requests, steps, and keeps what came out, by sequence."""

    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        run_ahead: bool = False,
        caching: bool = True,
        drafts: bool = False,
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
        self.oracles: dict[Name, Oracle] = {}
        self.scheduler = Scheduler(self.config, self.blocks, FakeDrafter(self.oracles) if drafts else None)
        self.runner = FakeRunner(self.config, num_blocks, block_size, self.oracles, run_ahead, drafts, self._on_plan)
        self.core = EngineCore(self.scheduler, self.runner, clock=lambda: self.now)
        self.now = 0.0
        self.plans: list[SchedulerOutput] = []
        self.streams: dict[Name, list[int]] = {}
        """Tokens per sequence, as they came out."""
        self.scored: dict[int, list[int]] = {}
        """What a request's prompt was scored with."""
        self.ended: dict[Name, Ended] = {}
        self.first_token_step: dict[Name, int] = {}
        """How many calls of :meth:`step` had been made when the first token came out."""
        self.steps = 0
        self.num_requests = 0

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
        holds: tuple[str, ...] = (),
        pooling: Pooling | None = None,
        forces: bool = False,
        **params: object,
    ) -> int:
        """Queue a request and return its id; an int as prompt gives that many tokens that no other prompt has. forces:
        with a grammar that often forces several tokens."""
        request_id = self.num_requests
        self.num_requests += 1
        if isinstance(prompt, int):
            prompt = [1000 * (request_id + 1) + i for i in range(prompt)]
        own = {"ignore_eos": True, "seed": 0, **params}
        if pooling is not None:
            max_tokens, own = 0, {"seed": 0}
        message = GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            params=SamplingParams(max_tokens=max_tokens, **own),  # type: ignore[arg-type]
            arrival=self.now + request_id * 1e-6 if arrival is None else arrival,
            priority=priority,
            deadline=deadline,
            cache_salt=salt,
            pooling=None if pooling is None else PoolingParams(pooling=pooling),
        )
        for index in range(message.params.n):
            name = name_of(request_id, index)
            self.oracles[name] = Oracle(message, EOS, self.config.max_model_len, index, forces)
            self.streams[name] = []
        if holds or forces:
            matcher = Forcing(self.oracles[request_id].chain[len(prompt) - 1]) if forces else None
            self.scheduler.add(message, holds, matcher)
        else:
            self.core.handle(message)
        self._collect(self.scheduler.take_outputs())
        return request_id

    def abort(self, *request_ids: int, samples: list[tuple[int, int]] | None = None) -> None:
        self.core.handle(Abort(list(request_ids), samples or []))
        self.scheduler.check_integrity()
        self._collect(self.scheduler.take_outputs())

    # --- steps ---

    def step(self, fault: str | None = None) -> SchedulerOutput | None:
        """One turn of the loop. ``fault`` makes the runner fail in "submit", or in the "wait" of this turn."""
        self.steps += 1
        before = len(self.plans)
        self.runner.fault = fault
        outputs = self.core.step().outputs
        self.runner.fault = None
        failed = [output for output in outputs if output.error is not None and output.error.code == INTERNAL]
        check(fault is not None or not failed, "a step failed, see the log", failed)
        self.scheduler.check_integrity()
        self._collect(outputs)
        return self.plans[-1] if len(self.plans) > before else None

    def _on_plan(self, plan: SchedulerOutput) -> None:
        self.plans.append(plan)
        self.scheduler.check_integrity()

    def run(self, max_steps: int = 1000, until: Callable[[], bool] | None = None) -> None:
        """Step until all requests ended, or until a condition holds."""
        for _ in range(max_steps):
            if until() if until else not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"not done after {max_steps} steps")

    def _collect(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            name = name_of(output.request_id, output.index)
            check(name not in self.ended, "an output after the last one", output)
            self.streams[name] += output.token_ids
            self._collect_scores(output)
            if output.token_ids:
                self.first_token_step.setdefault(name, self.steps)
            if output.finish_reason is not None:
                self.ended[name] = Ended(output.finish_reason, self.streams[name], output, self.steps)

    def _collect_scores(self, output: TokenOutput) -> None:
        """Each of the prompt's tokens is scored once, in order, and before the first token comes."""
        if output.index != 0:
            check(output.logprobs is None, "scores of another sample than the first", output)
            return
        message, scored = self.oracles[output.request_id].message, self.scored.setdefault(output.request_id, [])
        scored += [] if output.logprobs is None else [round(one.logprob) for one in output.logprobs.prompt]
        wanted = [] if message.params.prompt_logprobs is None else message.prompt_token_ids[1:]
        check(scored == wanted[: len(scored)], "wrong scores", scored, wanted)
        check(not output.token_ids or len(scored) == len(wanted), "a token before all scores", output)

    # --- what tests ask ---

    def row(self, request_id: int, plan: SchedulerOutput | None = None) -> ScheduledRow | None:
        """The request's row in a plan, by default the newest."""
        rows = (plan or self.plans[-1]).rows
        return next((row for row in rows if row.request_id == request_id), None)

    def running(self) -> list[int]:
        return sorted(slot.admission.request_id for slot in self.runner.slots.values())

    def check_answers(self) -> None:
        """Every sequence ended by itself, with the tokens and the reason that its oracle expects."""
        for name, oracle in self.oracles.items():
            ended = self.ended[name]
            check(ended.token_ids == oracle.generated, "wrong tokens", name, ended.token_ids, oracle.generated)
            check(ended.reason == oracle.reason, "wrong reason", name, ended.reason, oracle.reason)

    def check_idle(self) -> None:
        """Nothing is held any more."""
        stats = self.scheduler.stats()
        check(stats.running == stats.waiting == 0, "requests are left", stats)
        check(stats.free_blocks == stats.total_blocks == self.blocks.num_blocks, "blocks are lost", stats)
        self.scheduler.check_integrity()
