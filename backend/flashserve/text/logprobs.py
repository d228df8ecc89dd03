"""Log-probabilities with the texts of their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from flashserve.protocol import TokenLogprob
from flashserve.text.detokenizer import Detokenizer

LOWEST = -9999.0
"""Stands for the logarithm of 0, which JSON does not have."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token and how probable it was."""

    token_id: int
    text: str
    """What it adds to the text at its place; empty while a character is not whole, which the token that completes it
    then brings. A special token is its name, also where the text leaves it out."""
    logprob: float
    rank: int
    """1 is the most probable."""


@dataclass(slots=True)
class TokenScore:
    """A token of the text or of the prompt."""

    token: Candidate
    top: list[Candidate]
    """The most probable tokens at its place, as many as were asked for."""

    def as_vllm(self) -> dict[str, dict[str, float | int | str]]:
        """By token id; the token itself comes first, and once if it is among the most probable ones."""
        return {
            str(one.token_id): {"logprob": one.logprob, "rank": one.rank, "decoded_token": one.text}
            for one in (self.token, *self.top)
        }


class Scorer:
    """Gives one sequence's tokens their texts. Used by one thread."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        """detokenizer: one that shows special tokens."""
        self._detokenizer = detokenizer

    def score(self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprob]) -> list[TokenScore]:
        """Take the next tokens, with as many log-probabilities or more."""
        return [self._one(token_id, found) for token_id, found in zip(token_ids, logprobs, strict=False)]

    def finish(self, last: TokenScore) -> None:
        """The sequence has ended with ``last``: it gets the text of what never became a character."""
        last.token = replace(last.token, text=last.token.text + self._detokenizer.finish())

    def _one(self, token_id: int, found: TokenLogprob) -> TokenScore:
        peek = self._detokenizer.peek
        top = [Candidate(other, peek(other), _finite(x), rank) for rank, (other, x) in enumerate(found.top, 1)]
        text = self._detokenizer.feed((token_id,))
        return TokenScore(Candidate(token_id, text, _finite(found.logprob), found.rank), top)


def prompt_scores(
    token_ids: Sequence[int], logprobs: Sequence[TokenLogprob], detokenizer: Detokenizer
) -> list[TokenScore | None]:
    """Of a prompt's tokens; None for the first, before which there is nothing. detokenizer: as of a Scorer."""
    detokenizer.feed(token_ids[:1])
    return [None, *Scorer(detokenizer).score(token_ids[1:], logprobs)]


def to_json(scores: Iterable[TokenScore | None]) -> str:
    """A list in vLLM's form; None, of a prompt's first token, is null."""
    return json.dumps([None if score is None else score.as_vllm() for score in scores], ensure_ascii=False)


def _finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST
