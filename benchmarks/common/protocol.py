"""The worker's side of a comparison: requests as JSON lines on stdin, answers as JSON lines on stdout.

It runs in every peer's environment, so it needs the standard library only. What libraries print goes to stderr, which
is kept as the worker's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EngineSetup:
    """What an engine is told when it loads."""

    model: str
    """The folder that the engine reads: Hugging Face's layout, or what was made of it."""
    threads: int
    max_len: int
    """Most tokens of one request, prompt and output together."""
    max_requests: int
    """Most requests at once."""
    kv_gib: int
    """KV cache that holds all of them, in GiB, rounded up."""
    options: dict[str, Any]
    """What tells variants of one engine apart."""

    def flashserve_settings(self) -> dict[str, Any]:
        """The same in the words of model.json."""
        return {
            "dtype": "bfloat16",
            "enable_prefix_caching": False,
            "max_model_len": self.max_len,
            "max_num_seqs": self.max_requests,
            "num_threads": self.threads,
            **self.options,
        }


def random_prompts(rng: random.Random, lengths: Iterable[int], vocab_size: int) -> list[list[int]]:
    """Token ids but the first three, which are special where the models here have them."""
    return [[rng.randrange(3, vocab_size) for _ in range(length)] for length in lengths]


@dataclass(frozen=True)
class Requests:
    """In the order of their arrival."""

    prompts: list[list[int]]
    outputs: list[int]
    """Tokens that each request asks for, and gets: there is no end token."""
    arrivals: list[float]
    """Seconds after the beginning."""

    @classmethod
    def equal(cls, count: int, prompt: int, output: int, vocab_size: int) -> Requests:
        """All at once, all of one length; the same tokens for everyone who asks."""
        return cls(random_prompts(random.Random(prompt), [prompt] * count, vocab_size), [output] * count, [0.0] * count)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def longest(self) -> int:
        """Tokens of the longest, prompt and output together."""
        return max(len(prompt) + output for prompt, output in zip(self.prompts, self.outputs, strict=True))

    def head(self, count: int | None) -> Requests:
        return Requests(self.prompts[:count], self.outputs[:count], self.arrivals[:count])

    def at_most(self, output: int) -> Requests:
        """The same prompts, all at once and with short answers."""
        return Requests(self.prompts, [min(output, tokens) for tokens in self.outputs], [0.0] * len(self))


@dataclass(frozen=True)
class Run:
    """What became of requests. Times count in seconds from the moment the first was handed over; lists have an entry
    for each request, and are empty where an engine's interface has no use for them."""

    seconds: float
    """To the last token."""
    tokens: list[int]
    """Output tokens."""
    token_ids: list[list[int]] = field(default_factory=list)
    """What they were."""
    starts: list[float] = field(default_factory=list)
    """When a request was sent by its user, or computing it began."""
    firsts: list[float] = field(default_factory=list)
    """The first token, as soon as the user can have it; the end where an engine gives all tokens at once."""
    ends: list[float] = field(default_factory=list)
    responses: list[list[tuple[float, float]]] = field(default_factory=list)
    """When each response came, and how many tokens it held."""
    details: dict[str, Any] = field(default_factory=dict)
    """What only some engines can tell."""

    @property
    def tokens_per_s(self) -> float:
        return sum(self.tokens) / self.seconds


class PeerEngine(ABC):
    """One engine, kept loaded between runs. Whatever it raises is reported in the table."""

    settings: dict[str, Any]
    """What it was given beside the requests, for the report."""
    versions: dict[str, str]

    @abstractmethod
    def load(self, setup: EngineSetup) -> None: ...

    @abstractmethod
    def run(self, requests: Requests, batch: int, mode: str) -> Run:
        """Have all requests answered, at most ``batch`` at once; mode: how, where an engine has several ways.

        Offline engines that compute no latencies take all requests at once and with the first one's output length.
        """

    def close(self) -> None:  # noqa: B027 (nothing to do where the process's end does it)
        """Ends what the engine started."""


def serve(engine: PeerEngine) -> None:
    """Answer requests until "quit" or the end of stdin."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "quit":
                break
            try:
                answer = _answer(engine, request)
            except Exception as error:
                traceback.print_exc()
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
    finally:
        with contextlib.suppress(Exception):
            engine.close()


def _answer(engine: PeerEngine, request: dict[str, Any]) -> dict[str, Any]:
    if request["op"] == "load":
        engine.load(EngineSetup(**request["setup"]))
        return {"settings": engine.settings, "versions": engine.versions}
    return asdict(engine.run(Requests(**request["requests"]), request["batch"], request["mode"]))
