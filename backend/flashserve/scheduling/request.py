"""A request's state inside the engine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flashserve.protocol import GenerateRequest, PromptProgress, RequestTimings
from flashserve.scheduling.block_manager import BlockHash
from flashserve.scheduling.matcher import Matcher
from flashserve.scheduling.output import Admission
from flashserve.scheduling.pooling import PooledPrompt
from flashserve.scheduling.sequence import Sequence, Terms

Hold = str
"""Something that a request waits for before it can run, by name, such as a grammar that is being compiled."""


def max_total_tokens(message: GenerateRequest, max_model_len: int) -> int:
    """How long a sequence of the request may become."""
    most = message.params.max_tokens
    return max_model_len if most is None else min(max_model_len, len(message.prompt_token_ids) + most)


@dataclass(slots=True, eq=False)
class Request:
    """One or more sequences that continue one prompt. The scheduler is its sole writer.

    The sequences are admitted, preempted, aborted together. The first one computes the prompt, the others fork off
    where it ends; each then ends by itself.
    """

    terms: Terms
    deadline: float | None
    sequences: list[Sequence]
    holds: set[Hold]
    """What it waits for; until nothing is left, the waiting queue passes it over."""
    pooled: PooledPrompt | None = None
    """Its embedding as it grows, if it asks for that instead of tokens: it ends with its prompt."""
    return_progress: bool = False

    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0

    @classmethod
    def from_message(
        cls,
        message: GenerateRequest,
        seed: int,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        root: BlockHash,
        holds: Iterable[Hold] = (),
    ) -> Request:
        params = message.params
        ends = params.stop_token_ids if params.ignore_eos else (*eos_token_ids, *params.stop_token_ids)
        terms = Terms(
            request_id=message.request_id,
            params=params,
            seed=seed,
            priority=message.priority,
            arrival=message.arrival,
            num_prompt_tokens=len(message.prompt_token_ids),
            max_total_tokens=max_total_tokens(message, max_model_len),
            end_token_ids=frozenset(ends),
            hash_root=root,
            reads_cache=message.pooling is None or message.pooling.pooling == "last",
        )
        looks_back = params.needs_known_tokens
        first = Sequence(terms, 0, list(message.prompt_token_ids), needs_known_tokens=looks_back)
        forks = [Sequence(terms, index, [], needs_known_tokens=looks_back) for index in range(1, params.n)]
        pooling = message.pooling
        pooled = None if pooling is None else PooledPrompt(pooling.pooling, terms.num_prompt_tokens)
        return cls(
            terms, message.deadline, [first, *forks], set(holds), pooled, return_progress=message.return_progress
        )

    def constrain(self, matcher: Matcher) -> None:
        """Let its sequences, none of which has begun, keep to what a matcher says; each has its own."""
        for sequence in self.sequences:
            sequence.matcher = matcher if sequence.index == 0 else matcher.copy()
            sequence.needs_known_tokens |= matcher.follows_samples

    @property
    def is_constrained(self) -> bool:
        return self.sequences[0].matcher is not None

    @property
    def id(self) -> int:
        return self.terms.request_id

    @property
    def live(self) -> list[Sequence]:
        """The sequences that have not ended."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def num_pending(self) -> int:
        """Rows in flight whose results are still to be taken in: not those of sequences that have ended."""
        return sum(sequence.num_pending for sequence in self.live)

    def admissions(self) -> list[Admission]:
        """What the runner is told when the sequences take their slots. One that has not forked off yet knows what the
        first one knows: its prompt."""
        first = self.sequences[0].token_ids
        return [sequence.admission(sequence.token_ids or first) for sequence in self.live]

    def progress(self, processed: int, now: float) -> PromptProgress:
        """After a step that brought the prompt to so many tokens."""
        assert self.first_scheduled is not None
        return PromptProgress(
            total=self.terms.num_prompt_tokens,
            cache=self.cached_tokens,
            processed=processed,
            time_ms=round((now - self.first_scheduled) * 1000, 3),
        )

    def timings(self) -> RequestTimings:
        return RequestTimings(
            arrival=self.terms.arrival,
            first_scheduled=self.first_scheduled,
            first_token=self.first_token,
            last_token=self.last_token,
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )
