"""Which of several servers gets a request: the one that has computed the most of its prompt, within a bound on load.

The gateway has no tokenizer, so the beginnings of prompts are known by hashes of equal pieces of their text, chained,
each over the one before. The table is a guess at what the servers' own prefix caches hold: what it forgets, or does not
know, costs a prompt's computation and never an answer.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import Any

import orjson

_PIECE_BYTES = 256
"""About 64 tokens, four of an engine's blocks: a shorter beginning is not worth a longer queue."""
_MOST_PIECES = 512
"""Of one prompt, 32k tokens: of those that are alike for so long any is a good choice. Hashing them takes 0.7 ms."""
_CAPACITY = 65_536
"""Pieces that are remembered: 16 MiB of text, 22 MiB of memory."""
_LIFETIME_S = 180.0
"""Engines let go of what was not used for long; a table that does not would send sessions to caches that are empty."""
_SLACK, _RATIO = 4, 1.5
_FULL = 0.9
"""Of a server's KV blocks, held by requests: what is found there will be preempted."""


def beginnings(seed: Any, prompt: Any) -> list[int]:
    """The hashes of a prompt's first pieces, the same in every process.

    Args:
        seed: whatever else decides whether two prompts share their computation (JSON).
        prompt: a text, token ids or chat messages. Messages count in order, so that a conversation's next turn begins
            with the hashes of the last one.
    """
    text = _rendered(prompt, _PIECE_BYTES * _MOST_PIECES)
    digest = blake2b(orjson.dumps(seed), digest_size=8).digest()
    found = []
    for start in range(0, len(text) - _PIECE_BYTES + 1, _PIECE_BYTES):
        digest = blake2b(digest + text[start : start + _PIECE_BYTES], digest_size=8).digest()
        found.append(int.from_bytes(digest, "big"))
    return found


def _rendered(prompt: Any, limit: int) -> bytes:
    """At most the first ``limit`` bytes of a prompt in one form for each kind."""
    if isinstance(prompt, str):
        return prompt[:limit].encode("utf-8", "surrogatepass")[:limit]
    parts: list[bytes] = []
    size = 0
    for item in prompt:
        parts.append(orjson.dumps(item))
        size += len(parts[-1]) + 1
        if size > limit:
            break
    return b"\n".join(parts)[:limit]


class Beginnings:
    """Which servers were sent which beginnings of prompts lately. The pool alone writes to it."""

    def __init__(
        self, capacity: int = _CAPACITY, lifetime_s: float = _LIFETIME_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._capacity = capacity
        self._lifetime_s = lifetime_s
        self._clock = clock
        self._seen: OrderedDict[int, dict[int, float]] = OrderedDict()
        """By hash: servers, and when each got it last. The least recently used hash comes first."""

    def __len__(self) -> int:
        return len(self._seen)

    def lengths(self, hashes: Sequence[int]) -> dict[int, int]:
        """By server: how many of the first pieces it has; none is left out."""
        since = self._clock() - self._lifetime_s
        lengths: dict[int, int] = {}
        for count, value in enumerate(hashes):
            having = [server for server, at in self._seen.get(value, {}).items() if at > since]
            going_on = [server for server in having if lengths.get(server, 0) == count]
            if not going_on:
                break
            lengths.update(dict.fromkeys(going_on, count + 1))
        return lengths

    def add(self, hashes: Sequence[int], server: int) -> None:
        """A server gets a prompt that begins so."""
        now = self._clock()
        for value in reversed(hashes):  # the first piece is used last: without it the others could not be found
            self._seen.setdefault(value, {})[server] = now
            self._seen.move_to_end(value)
        while len(self._seen) > self._capacity:
            self._seen.popitem(last=False)

    def forget(self, server: int) -> None:
        """A server's cache is gone."""
        for value, servers in list(self._seen.items()):
            servers.pop(server, None)
            if not servers:
                del self._seen[value]


@dataclass(frozen=True)
class Candidate:
    """A server that could answer."""

    server: int
    load: int
    """Requests that it has or is about to get."""
    kv_usage: float = 0.0
    """The share of its KV blocks that requests hold, 0 to 1."""


def order(candidates: Sequence[Candidate], lengths: Mapping[int, int], random: Random) -> list[int]:
    """The servers, in the order in which they are to be tried.

    The first is the one with the longest beginning, of equals the least loaded, among those whose load is near the
    least: a full server is not chosen for its cache, and neither is one that others wait for. The rest follow by load.
    """
    if not candidates:
        return []
    least = min(candidate.load for candidate in candidates)
    bound = max(least + _SLACK, _RATIO * least)
    near = [candidate for candidate in candidates if candidate.load <= bound]
    roomy = [candidate for candidate in near if candidate.kv_usage < _FULL] or near
    lot = {candidate.server: random.random() for candidate in candidates}
    first = min(roomy, key=lambda item: (-lengths.get(item.server, 0), item.load, lot[item.server]))
    rest = sorted(candidates, key=lambda item: (item.load, lot[item.server]))
    return [first.server, *(item.server for item in rest if item is not first)]
