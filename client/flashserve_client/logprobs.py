"""Log-probabilities of tokens, as the server writes them in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Candidate:
    """A token and how probable it was.

    Attributes:
        token_id: its number in the vocabulary.
        text: what it adds to the text at its place; empty while a character is not whole.
        logprob: the natural logarithm of its probability.
        rank: 1 is the most probable token.
    """

    token_id: int
    text: str
    logprob: float
    rank: int


@dataclass(frozen=True)
class TokenLogprobs:
    """A token of an answer or of a prompt.

    Attributes:
        token: the token itself.
        candidates: it and the most probable ones at its place, by rank: as many as were asked for, and it if it is not
            among them.
    """

    token: Candidate
    candidates: tuple[Candidate, ...]


def tokens_from_json(text: str) -> tuple[TokenLogprobs, ...]:
    """From the output `logprobs`. ValueError if it is something else; null is nothing."""
    return tuple(_token(entry) for entry in json.loads(text) or ())


def prompt_from_json(text: str) -> tuple[TokenLogprobs | None, ...]:
    """From the output `prompt_logprobs`, whose first token has none. ValueError if it is something else."""
    return tuple(None if entry is None else _token(entry) for entry in json.loads(text))


def _token(entry: Any) -> TokenLogprobs:
    try:
        found = [
            Candidate(int(number), one["decoded_token"], one["logprob"], one["rank"]) for number, one in entry.items()
        ]
        return TokenLogprobs(found[0], tuple(sorted(found, key=lambda one: one.rank)))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no log-probabilities of a token: {entry!r:.80}") from error
