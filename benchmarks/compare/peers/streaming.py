"""Closed-loop users of a streaming server: each sends its next request when its last one is complete."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable

from benchmarks.common.protocol import Run

Stream = Callable[[list[int], int], AsyncIterator[float]]
"""(prompt, output tokens) → the number of tokens of each response, as they come."""


async def run_users(users: int, prompts: list[list[int]], output_tokens: int, stream: Stream) -> Run:
    """All prompts, ``users`` at a time."""
    starts = [0.0] * len(prompts)
    responses: list[list[tuple[float, float]]] = [[] for _ in prompts]
    waiting = itertools.count()
    begun = time.perf_counter()

    async def user() -> None:
        while (number := next(waiting)) < len(prompts):
            starts[number] = time.perf_counter() - begun
            async for count in stream(prompts[number], output_tokens):
                if count:
                    responses[number].append((time.perf_counter() - begun, count))

    await asyncio.gather(*(user() for _ in range(min(users, len(prompts)))))
    seconds = time.perf_counter() - begun
    tokens = [round(sum(count for _, count in each)) for each in responses]
    return Run(seconds, tokens, starts=starts, responses=responses)
