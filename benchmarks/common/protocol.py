"""The worker's side of a comparison: requests as JSON lines on stdin, answers as JSON lines on stdout.

It runs in every peer's environment, so it needs the standard library only. What libraries print goes to stderr, which
is kept as the worker's log.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Workload:
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


@dataclass(frozen=True)
class Run:
    """One batch of requests. Times count in seconds from the moment all of them were handed over."""

    seconds: float
    tokens: list[int]
    """Output tokens of each request."""
    token_ids: list[list[int]] = field(default_factory=list)
    """What they were; empty where the engine's interface does not tell."""
    starts: list[float] = field(default_factory=list)
    """When each request was sent; empty where nothing is streamed."""
    responses: list[list[tuple[float, float]]] = field(default_factory=list)
    """Of each request: when each response came, and how many tokens it held; empty where nothing is streamed."""


class PeerEngine(ABC):
    """One engine, kept loaded between runs. Whatever it raises is reported in the table."""

    settings: dict[str, Any]
    """What it was given beside the workload, for the report."""
    versions: dict[str, str]

    @abstractmethod
    def load(self, work: Workload) -> None: ...

    @abstractmethod
    def run(self, prompts: list[list[int]], output_tokens: int) -> Run: ...

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
    started = time.perf_counter()
    if request["op"] == "load":
        engine.load(Workload(**request["work"]))
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "settings": engine.settings, "versions": engine.versions}
    run = engine.run(**{name: value for name, value in request.items() if name != "op"})
    return asdict(run)
