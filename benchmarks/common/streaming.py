"""Users of a streaming server. Standard library only: a peer's worker uses it too."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Sequence

from benchmarks.common.protocol import Run

Stream = Callable[[list[int], int], AsyncIterator[float]]
"""(prompt, output tokens) → the number of tokens of each response, as they come."""


async def run_users(
    users: int, prompts: list[list[int]], outputs: Sequence[int], stream: Stream, arrivals: Sequence[float] = ()
) -> Run:
    """All prompts, ``users`` at a time: each user sends a request when its last one is complete, and not before the
    request has arrived (arrivals: seconds, ascending; none: all are there from the beginning)."""
    starts, ends = [0.0] * len(prompts), [0.0] * len(prompts)
    responses: list[list[tuple[float, float]]] = [[] for _ in prompts]
    waiting = itertools.count()
    begun = time.perf_counter()

    async def user() -> None:
        while (number := next(waiting)) < len(prompts):
            if arrivals:
                await asyncio.sleep(max(0.0, arrivals[number] - (time.perf_counter() - begun)))
            starts[number] = time.perf_counter() - begun
            async for count in stream(prompts[number], outputs[number]):
                if count:
                    responses[number].append((time.perf_counter() - begun, count))
            ends[number] = time.perf_counter() - begun

    await asyncio.gather(*(user() for _ in range(min(users, len(prompts)))))
    tokens = [round(sum(count for _, count in each)) for each in responses]
    firsts = [each[0][0] for each in responses]
    return Run(max(ends), tokens, starts=starts, firsts=firsts, ends=ends, responses=responses)
