"""Counts how streams end when their server does: on purpose (SIGTERM), and by the death of tritonserver (SIGKILL)."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from async_requests import FAR_AWAY
from flashserve_client import AsyncClient, Cancelled, ConnectionFailed, FlashserveError
from harness import HTTP, Server
from null_models import null_model, write_null_model

STREAMS = 16
MODELS = ("first", "second")
STEP_MS = 20.0
END_BOUND_S = 10.0
BACK_BOUND_S = 60.0


@dataclass
class Ends:
    """What became of the streams of all tries."""

    outcomes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    end_s: list[float] = field(default_factory=list)
    """From a SIGTERM to the launcher's end."""
    back_s: list[float] = field(default_factory=list)
    """From tritonserver's death until it serves the models that it had."""

    def show(self) -> None:
        for name, count in sorted(self.outcomes.items()):
            print(f"{count:7}  {name}")
        for name, seconds in (("ended", self.end_s), ("served again", self.back_s)):
            if seconds:
                median, worst = statistics.median(seconds), max(seconds)
                print(f"{len(seconds):7}  {name} after {median:.1f} s (median), {worst:.1f} s (worst)")


def count_ends(tries: int) -> list[str]:
    """Everything that was wrong, in words."""
    ends = Ends()
    with tempfile.TemporaryDirectory() as folder:
        weights = write_null_model(Path(folder) / "null")
        for number in range(1, tries + 1):
            before = len(ends.problems)
            server = Server({name: null_model(weights, STEP_MS) for name in MODELS})
            try:
                server.start()
                asyncio.run(one_try(server, ends))
                ends.problems += [f"left behind: {what}" for what in server.leftovers()]
            except AssertionError as error:
                ends.problems.append(str(error)[-2000:])
            finally:
                server.destroy()
            print(f"try {number} of {tries}: {len(ends.problems) - before} problems", flush=True)
    ends.show()
    return ends.problems


async def one_try(server: Server, ends: Ends) -> None:
    (tritonserver,) = server.tritonserver_pids()
    async with Streams(server) as streams:
        await streams.have_begun()
        os.kill(tritonserver, signal.SIGKILL)
        killed = time.monotonic()
        await streams.judge("SIGKILL of tritonserver", (ConnectionFailed,), ends)
    while not await asyncio.to_thread(serves, server):
        if time.monotonic() > killed + BACK_BOUND_S:
            raise AssertionError(f"not back with its models after {BACK_BOUND_S:.0f} s:\n{server.log}")
        await asyncio.sleep(0.1)
    ends.back_s.append(time.monotonic() - killed)
    assert server.launcher is not None
    async with Streams(server) as streams:
        await streams.have_begun()
        server.launcher.send_signal(signal.SIGTERM)
        told = time.monotonic()
        await streams.judge("SIGTERM", (Cancelled,), ends)
        await asyncio.to_thread(server.launcher.wait, END_BOUND_S)
        ends.end_s.append(time.monotonic() - told)


def serves(server: Server) -> bool:
    try:
        return all(HTTP.get(f"{server.http}/v2/models/{name}/ready", timeout=5).status_code == 200 for name in MODELS)
    except OSError:
        return False
    except Exception as error:  # httpx's own, while nobody listens
        assert type(error).__module__.startswith("httpx"), error
        return False


class Streams:
    """Half of them over each protocol, on both models; none would end by itself before minutes."""

    def __init__(self, server: Server) -> None:
        urls = (server.http, f"grpc://{server.grpc}")
        self._clients = [AsyncClient(url, model=model) for url in urls for model in MODELS]
        self._begun = [asyncio.Event() for _ in range(STREAMS)]
        self._tasks: list[asyncio.Task[str]] = []

    async def __aenter__(self) -> Streams:
        for index, begun in enumerate(self._begun):
            self._tasks.append(asyncio.create_task(self._read(self._clients[index % len(self._clients)], begun)))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for client in self._clients:
            await client.aclose()

    async def have_begun(self) -> None:
        await asyncio.wait_for(asyncio.gather(*(begun.wait() for begun in self._begun)), BACK_BOUND_S)

    async def judge(self, what: str, errors: tuple[type[FlashserveError], ...], ends: Ends) -> None:
        """Each has its finish or one of these errors in time."""
        await asyncio.wait(self._tasks, timeout=END_BOUND_S)
        for task in self._tasks:
            error = task.exception() if task.done() else None
            outcome = "no end" if not task.done() else type(error).__name__ if error else f"finish {task.result()}"
            ends.outcomes[f"{what}: {outcome}"] += 1
            if not task.done() or (error is not None and not isinstance(error, errors)):
                ends.problems.append(f"{what}: {outcome} {error or ''}")

    async def _read(self, client: AsyncClient, begun: asyncio.Event) -> str:
        async with client.stream("def ", max_tokens=FAR_AWAY, ignore_eos=True) as answer:
            async for _ in answer:
                begun.set()
            return str(answer.result.finish_reason)
