"""One of the texts that a request generates: its tokens, and what it holds while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain

from flashserve.protocol import FinishReason, SamplingParams
from flashserve.scheduling.block_manager import BlockHash, chain_hash
from flashserve.scheduling.matcher import Matcher
from flashserve.scheduling.output import Admission

MAX_FORCED = 64
"""Tokens that are taken behind a sample where a grammar leaves no choice: a row of more would keep others waiting."""
MAX_PASSED_OVER = 16  # steps after which a prefill that shorter ones overtook goes first: 1/17 of the budget at worst


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What a request asked for: the same for all of its sequences."""

    request_id: int
    params: SamplingParams
    seed: int
    priority: int
    arrival: float
    num_prompt_tokens: int
    max_total_tokens: int
    """A sequence ends when it has this many tokens."""
    end_token_ids: frozenset[int]
    hash_root: BlockHash
    reads_cache: bool = True
    """Whether it may skip what the prefix cache holds: not where hidden states of all tokens are asked for."""


@dataclass(slots=True, eq=False)
class Sequence:
    """The prompt and one continuation of it. The scheduler is its sole writer.

    There are no phases: ``num_computed_tokens`` catches up with the known tokens, in chunks or one by one.
    """

    terms: Terms
    index: int
    """Among the request's sequences."""
    token_ids: list[int]
    """Prompt, then what was generated. Empty until it forks off the first sequence of its request."""

    num_computed_tokens: int = 0
    """Tokens whose KV is, or after the submitted steps will be, in ``block_ids``."""
    num_pending: int = 0
    """Rows whose samples are not known yet: 0 or 1 when a step is planned; with run-ahead 2 until the last is known."""
    block_ids: list[int] = field(default_factory=list)
    unsent_block_ids: list[int] = field(default_factory=list)
    """The last of them, of which the runner has not been told yet."""
    writable_end: int = 0
    """At this position it must ask for a block before it writes: its blocks end there, or it shares the last one."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Of the full blocks of known tokens, as far as they were needed."""
    num_scored: int = 0
    """Tokens of the prompt, the first one included, whose log-probabilities are known or in flight: what is computed
    again after a preemption is not scored again."""
    slot: int | None = None
    """The runner's slot while running; None while waiting."""
    passed_over: int = 0
    """Steps in a row in which this prefill got no token."""
    finish_reason: FinishReason | None = None
    needs_known_tokens: bool = False
    """Whether a row needs the last sample, and brings along what is known: it is to look back on it, or a matcher
    decides what may follow, and what must. Asked for each step's row."""
    matcher: Matcher | None = None
    """What its tokens must keep to."""

    @property
    def num_remaining(self) -> int:
        """Known tokens that are not computed yet."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def wants_scores(self) -> bool:
        """Whether log-probabilities of its prompt's tokens are still to be computed: the first sequence does it."""
        terms = self.terms
        return (
            terms.params.prompt_logprobs is not None and self.index == 0 and self.num_scored < terms.num_prompt_tokens
        )

    def score(self, start: int, end: int) -> tuple[list[int], int]:
        """The prompt's tokens that computing tokens ``start .. end - 1`` scores, and the first one's position. Each is
        given once."""
        first = max(start + 1, self.num_scored)
        last = min(end + 1, self.terms.num_prompt_tokens)
        self.num_scored = max(self.num_scored, last)
        return self.token_ids[first:last], first

    @property
    def awaits_last_sample(self) -> bool:
        """Whether the sample in flight reaches the length limit: it will end without another row."""
        return self.num_pending > 0 and self.num_computed_tokens + 1 >= self.terms.max_total_tokens

    @property
    def awaits_sample(self) -> bool:
        """Whether there can be no further row before the sample in flight is known: it is the last one, or the row
        needs it."""
        return self.num_pending > 0 and (
            self.needs_known_tokens or self.num_computed_tokens + 1 >= self.terms.max_total_tokens
        )

    @property
    def prefill_order(self) -> tuple[int, int, float]:
        """Shortest remaining first within a priority; one that was passed over for long goes before."""
        remaining = 0 if self.passed_over > MAX_PASSED_OVER else self.num_remaining
        return (self.terms.priority, remaining, self.terms.arrival)

    def take(self, token_ids: list[int]) -> tuple[list[int], FinishReason | None]:
        """Append samples up to the one that ends the sequence. Returns those, and why it ended, if it did: with "error"
        where the one behind them is none that its matcher allows."""
        if self.matcher is not None:
            return self._take_matched(token_ids, self.matcher)
        terms, known = self.terms, self.token_ids
        num_known = len(known)
        for token_id in token_ids:
            known.append(token_id)
            if token_id in terms.end_token_ids or len(known) >= terms.max_total_tokens:
                reason = self._reason_to_end()
                if reason is not None:
                    return token_ids[: len(known) - num_known], reason
        return token_ids, None

    def _take_matched(self, token_ids: list[int], matcher: Matcher) -> tuple[list[int], FinishReason | None]:
        known = self.token_ids
        num_known = len(known)
        for token_id in chain(token_ids, self._forced(matcher)):  # which is asked when the samples are taken
            reason = self._match(token_id, matcher)
            if reason is not None:
                return known[num_known:], reason
        return known[num_known:], None

    def _match(self, token_id: int, matcher: Matcher) -> FinishReason | None:
        """Append a token, or what its matcher says instead, and say why the sequence ends with it, if it does."""
        known, most = self.token_ids, self.terms.max_total_tokens
        closing = matcher.ends_with(token_id, most - len(known) - 1)
        if closing is not None:
            known += closing
            return "length"
        if not matcher.take(token_id):
            return "error"
        known.append(token_id)
        if matcher.is_done:
            if token_id == matcher.end_token:
                return "stop"
            if len(known) < most:
                known.append(matcher.end_token)
                return "stop"
        return self._reason_to_end()

    def _forced(self, matcher: Matcher) -> Iterator[int]:
        """What follows without a choice, and so without steps of its own. Not where more is asked of a token than to
        come next: how probable it is, or whether other parameters rule it out."""
        params = self.terms.params
        if params.logprobs is not None or params.bad_word_ids:
            return
        for token_id in matcher.forced(MAX_FORCED):
            if token_id in self.terms.end_token_ids:
                return
            yield token_id

    def _reason_to_end(self) -> FinishReason | None:
        """Whether the last token ends the sequence, and why."""
        terms, known = self.terms, self.token_ids
        if known[-1] in terms.end_token_ids and len(known) - terms.num_prompt_tokens > terms.params.min_tokens:
            return "stop"
        return "length" if len(known) >= terms.max_total_tokens else None

    def hash_blocks(self, count: int, block_size: int) -> list[BlockHash]:
        """Hashes of the first ``count`` blocks, all of whose tokens must be known; each is computed once."""
        hashes = self.block_hashes
        for index in range(len(hashes), count):
            parent = hashes[-1] if hashes else self.terms.hash_root
            hashes.append(chain_hash(parent, self.token_ids[index * block_size : (index + 1) * block_size]))
        return hashes[:count]

    def admission(self, known_token_ids: list[int]) -> Admission:
        """What the runner is told when the sequence takes its slot. known_token_ids: its own, or those of the sequence
        that it will fork off."""
        terms = self.terms
        looks_back = terms.params.penalizes or terms.params.needs_known_tokens
        assert self.slot is not None
        return Admission(
            request_id=terms.request_id,
            slot=self.slot,
            params=terms.params,
            seed=terms.seed + self.index,
            num_prompt_tokens=terms.num_prompt_tokens,
            end_token_ids=tuple(terms.end_token_ids),
            index=self.index,
            known_token_ids=list(known_token_ids) if looks_back else [],
        )
