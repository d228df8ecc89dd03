"""Many requests at once, waits with a bound, and the processes behind a model."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import psutil

from flashserve_client import AsyncClient
from harness import Server

FAR_AWAY = 1_000_000  # max_tokens: cut to what the context takes


async def read(client: AsyncClient, prompt: str = "hello", texts: list[str] | None = None, **options: Any) -> str:
    """Stream to the end, which is far away unless max_tokens is given; ``texts`` gets what comes."""
    texts = [] if texts is None else texts
    async for delta in client.stream(prompt, **{"max_tokens": FAR_AWAY, **options}):
        texts.append(delta.text)
    return "".join(texts)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition; AssertionError that says ``what`` was waited for."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        await asyncio.sleep(0.001)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait until the clients have told the server."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def errors_of(tasks: list[asyncio.Task[Any]], timeout_s: float) -> list[BaseException | None]:
    """What the tasks ended with; fails if one has not ended in time."""
    _, running = await asyncio.wait(tasks, timeout=timeout_s)
    assert not running, f"{len(running)} of {len(tasks)} requests still run after {timeout_s:g} s"
    return [task.exception() for task in tasks]


def engine_of(server: Server, model: str) -> psutil.Process:
    """The engine process of a loaded model with one instance."""
    (stub,) = server.stubs(model)
    (engine,) = psutil.Process(stub.pid).children()
    return engine


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that has ended and is not reaped yet does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_memory(server: Server) -> set[str]:
    """Names of the server's shared memory regions."""
    assert server.launcher is not None
    return {name for name in os.listdir("/dev/shm") if name.startswith(f"flashserve-{server.launcher.pid}-")}
