"""The answer cache: what an engine answered is given to whoever asks exactly the same again, for a while.

Only where the same request has the same answer: with temperature 0 or a seed. What is kept is what an engine said, not
what a client was sent: ids and times are each request's own, and a stream and an answer at once share it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from pydantic import TypeAdapter, ValidationError

from flashserve_client import Delta, GenerateResult

from .metrics import Metrics
from .pool import Ask
from .store.interface import Shelf, StoreAway

HEADER = "x-cache"
_WHOLE = ("stop", "length")
_FORMAT = 1
"""Of what is kept; another one is not found."""


class KeptAnswer(NamedTuple):
    """A whole answer."""

    pieces: list[Delta]
    """As it was streamed; one, if it was not."""
    result: GenerateResult

    def pieces_for(self, ask: Ask) -> list[Delta]:
        """What the engine would have sent now."""
        if ask.stream and len(self.pieces) > 1:
            return self.pieces
        logprobs = (self.result.logprobs or ()) if ask.stream else ()
        return [Delta(self.result.text, self.result.completion_tokens, self.result.finish_reason, logprobs=logprobs)]


_JSON = TypeAdapter(KeptAnswer)


def may_be_kept(ask: Ask) -> bool:
    """Whether the ask has one answer. The progress of a prompt is told by an engine that reads it."""
    temperature, seed = ask.params.get("temperature"), ask.params.get("seed")
    is_greedy = isinstance(temperature, (int, float)) and not isinstance(temperature, bool) and temperature == 0
    is_determined = is_greedy or type(seed) is int
    return is_determined and not ask.embeds and not ask.params.get("return_progress")


class AnswerCache:
    """Answers by owner: what one key asked, no other can find out from how fast it is answered."""

    def __init__(self, shelf: Shelf, metrics: Metrics) -> None:
        self._shelf = shelf
        self._metrics = metrics

    async def find(self, owner: str, asks: Sequence[Ask], version: str) -> list[KeptAnswer] | None:
        """The answers to all of them; None where one is missing. Raises StoreAway."""
        bodies = await self._shelf.get(owner, [_name(ask, version) for ask in asks])
        whole = [body for body in bodies if body is not None]
        found = None
        if len(whole) == len(asks):
            with contextlib.suppress(ValidationError):  # of another version of this program
                found = [_JSON.validate_json(body) for body in whole]
        self._metrics.answer_cache.labels("miss" if found is None else "hit").inc()
        return found

    async def keep(self, owner: str, ask: Ask, version: str, answer: KeptAnswer) -> None:
        """Keeps what is whole, unless the store is away."""
        if answer.result.finish_reason not in _WHOLE:
            return
        with contextlib.suppress(StoreAway):
            await self._shelf.put(owner, _name(ask, version), _JSON.dump_json(answer))


def _name(ask: Ask, version: str) -> str:
    """Of everything that an engine is told; its priority and its id change no answer."""
    told = [_FORMAT, ask.model, version, ask.prompt, ask.params]
    return hashlib.sha256(orjson.dumps(told, option=orjson.OPT_SORT_KEYS)).hexdigest()
