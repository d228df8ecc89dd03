"""A request's state inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from flashserve.protocol import FinishReason, GenerateRequest, RequestTimings, SamplingParams
from flashserve.scheduling.block_manager import BlockHash, chain_hash
from flashserve.scheduling.output import Admission

MAX_PASSED_OVER = 16  # steps after which a prefill that shorter ones overtook goes first: 1/17 of the budget at worst


@dataclass(slots=True, eq=False)
class Request:
    """One sequence. The scheduler is its sole writer.

    There are no phases: ``num_computed_tokens`` catches up with the known tokens, in chunks or one by one.
    """

    id: int
    params: SamplingParams
    seed: int
    priority: int
    arrival: float
    deadline: float | None
    token_ids: list[int]
    """Prompt, then what was generated."""
    num_prompt_tokens: int
    max_total_tokens: int
    """The request ends when it has this many tokens."""
    end_token_ids: frozenset[int]
    hash_root: BlockHash

    num_computed_tokens: int = 0
    """Tokens whose KV is, or after the submitted steps will be, in ``block_ids``."""
    num_pending: int = 0
    """Samples planned but not known yet: 0 or 1 when a step is planned; with run-ahead 2 until the last is known."""
    block_ids: list[int] = field(default_factory=list)
    unsent_block_ids: list[int] = field(default_factory=list)
    """Blocks that the runner has not been told of yet."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of known tokens, as far as they were needed."""
    slot: int | None = None
    """The runner's slot while running; None while waiting."""
    passed_over: int = 0
    """Steps in a row in which this prefill got no token."""

    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @classmethod
    def from_message(
        cls, message: GenerateRequest, seed: int, eos_token_ids: tuple[int, ...], max_model_len: int, root: BlockHash
    ) -> Request:
        params = message.params
        length = len(message.prompt_token_ids)
        limit = max_model_len if params.max_tokens is None else min(max_model_len, length + params.max_tokens)
        ends = params.stop_token_ids if params.ignore_eos else (*eos_token_ids, *params.stop_token_ids)
        return cls(
            id=message.request_id,
            params=params,
            seed=seed,
            priority=message.priority,
            arrival=message.arrival,
            deadline=message.deadline,
            token_ids=list(message.prompt_token_ids),
            num_prompt_tokens=length,
            max_total_tokens=limit,
            end_token_ids=frozenset(ends),
            hash_root=root,
        )

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def awaits_last_sample(self) -> bool:
        """Whether the sample in flight reaches the length limit: it will end without another row."""
        return self.num_pending > 0 and self.num_computed_tokens + 1 >= self.max_total_tokens

    @property
    def prefill_order(self) -> tuple[int, int, float]:
        """Shortest remaining first within a priority; one that was passed over for long goes before."""
        remaining = 0 if self.passed_over > MAX_PASSED_OVER else self.num_remaining
        return (self.priority, remaining, self.arrival)

    def take(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Append samples up to the one that ends the request. Returns those, and why it ended, if it did."""
        for count, token_id in enumerate(token_ids, 1):
            self.token_ids.append(token_id)
            reason = self._finish_reason(token_id)
            if reason is not None:
                return token_ids[:count], reason
        return token_ids, None

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.end_token_ids and self.num_generated > self.params.min_tokens:
            return "stop"
        if len(self.token_ids) >= self.max_total_tokens:
            return "length"
        return None

    def hash_blocks(self, count: int, block_size: int) -> list[BlockHash]:
        """Hashes of the first ``count`` blocks, all of whose tokens must be known; each is computed once."""
        hashes = self.block_hashes
        for index in range(len(hashes), count):
            parent = hashes[-1] if hashes else self.hash_root
            hashes.append(chain_hash(parent, self.token_ids[index * block_size : (index + 1) * block_size]))
        return hashes[:count]

    def admission(self) -> Admission:
        """What the runner is told when the request takes its slot."""
        assert self.slot is not None
        return Admission(
            request_id=self.id,
            slot=self.slot,
            params=self.params,
            seed=self.seed,
            num_prompt_tokens=self.num_prompt_tokens,
            end_token_ids=tuple(self.end_token_ids),
        )

    def timings(self) -> RequestTimings:
        return RequestTimings(
            arrival=self.arrival,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            last_token=self.last_token,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )
