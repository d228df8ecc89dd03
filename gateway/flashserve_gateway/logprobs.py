"""Log-probabilities in OpenAI's two forms: a chat's list of tokens, and completions' parallel lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flashserve_client import Candidate, TokenLogprobs

from . import parameters
from .errors import invalid

MOST = 20
"""Alternatives that a token may have."""

Tokens = Sequence[TokenLogprobs]


def read_chat_count(body: Mapping[str, Any]) -> int | None:
    """How many alternatives each token of a chat's answer is to have; None: no log-probabilities. Raises ApiError."""
    wanted = parameters.read(body, "logprobs", bool, False)
    count = _read_count(body, "top_logprobs")
    if count and not wanted:
        raise invalid("top_logprobs", "top_logprobs: needs logprobs: true")
    return (count or 0) if wanted else None


def read_completion_count(body: Mapping[str, Any]) -> int | None:
    """The same of a completion, whose `logprobs` is the number. Raises ApiError."""
    return None if body.get("logprobs") is False else _read_count(body, "logprobs")


def _read_count(body: Mapping[str, Any], name: str) -> int | None:
    if body.get(name) is None:
        return None
    count = parameters.read(body, name, int, 0)
    if not 0 <= count <= MOST:
        raise invalid(name, f"{name} must be an integer in [0, {MOST}], not {count}")
    return count


def chat_logprobs(tokens: Tokens, count: int) -> dict[str, Any]:
    """Of all tokens that the model wrote, those of its reasoning and of its calls among them.

    The bytes join to the text's: those of a character that several tokens make are the last one's.
    """
    content = [
        {**_chat_token(one.token), "top_logprobs": [_chat_token(other) for other in one.candidates[:count]]}
        for one in tokens
    ]
    return {"content": content, "refusal": None}


def _chat_token(one: Candidate) -> dict[str, Any]:
    return {"token": one.text, "logprob": one.logprob, "bytes": list(one.text.encode())}


def completion_logprobs(tokens: Sequence[TokenLogprobs | None], offset: int, first: str = "") -> dict[str, Any]:
    """Parallel lists of a completion's tokens.

    Args:
        tokens: None for a prompt's first token, before which there is nothing.
        offset: characters of the choice's text before them.
        first: the text of a prompt's first token.
    """
    texts = [first if one is None else one.token.text for one in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else one.token.logprob for one in tokens],
        "top_logprobs": [None if one is None else _by_text(one.candidates) for one in tokens],
        "text_offset": offsets,
    }


def _by_text(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The more probable one of two with the same text."""
    return {one.text: one.logprob for one in reversed(candidates)}


def echoed_logprobs(prompt: str, of_prompt: Sequence[TokenLogprobs | None], tokens: Tokens) -> dict[str, Any]:
    """Of a prompt that the answer repeats, and of the answer."""
    known = sum(len(one.token.text) for one in of_prompt if one is not None)
    first = prompt[: max(0, len(prompt) - known)]
    return completion_logprobs([*of_prompt, *tokens], 0, first)
