"""Users of a streaming server. Standard library only: a peer's worker uses it too."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable

from benchmarks.common.protocol import Requests, Run

Stream = Callable[[list[int], int], AsyncIterator[float]]
"""(prompt, output tokens) → the number of tokens of each response, as they come."""


async def run_users(users: int, requests: Requests, stream: Stream) -> Run:
    """All requests, ``users`` at a time: each user sends one when its last one is complete, and not before it has
    arrived."""
    count = len(requests)
    starts, ends = [0.0] * count, [0.0] * count
    responses: list[list[tuple[float, float]]] = [[] for _ in range(count)]
    waiting = itertools.count()
    begun = time.perf_counter()

    async def user() -> None:
        while (number := next(waiting)) < count:
            await asyncio.sleep(max(0.0, requests.arrivals[number] - (time.perf_counter() - begun)))
            starts[number] = time.perf_counter() - begun
            async for tokens in stream(requests.prompts[number], requests.outputs[number]):
                if tokens:
                    responses[number].append((time.perf_counter() - begun, tokens))
            ends[number] = time.perf_counter() - begun

    await asyncio.gather(*(user() for _ in range(min(users, count))))
    totals = [round(sum(tokens for _, tokens in each)) for each in responses]
    firsts = [each[0][0] for each in responses]
    return Run(max(ends), totals, starts=starts, firsts=firsts, ends=ends, responses=responses)
