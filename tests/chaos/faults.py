"""What chaos breaks, and what must be as before when it is over."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import httpx
import psutil

from async_requests import engine_of
from flashserve_client import AsyncClient, FlashserveError
from harness import HTTP, Server
from redis_peer import RedisPeer

RECOVERY_BOUND_S = 60.0


@dataclass
class Breaker:
    """Breaks one thing after another, and waits each time until the model answers again."""

    server: Server
    model: str
    rng: random.Random
    note_fault: Callable[[], None]
    recovery_s: dict[str, list[float]] = field(default_factory=dict)
    redis_kills: int = 0

    async def break_something(self) -> None:
        kinds: list[Callable[[], Awaitable[None]]] = [self.kill_engine, self.stop_engine, self.kill_stub, self.reload]
        action = self.rng.choice(kinds)
        self.note_fault()
        started = time.monotonic()
        await action()
        await self._until_it_answers()
        self.note_fault()  # until here
        self.recovery_s.setdefault(action.__name__, []).append(time.monotonic() - started)

    async def break_gateway(self) -> None:
        """Kills it whatever else is broken at that moment, and waits until it answers again."""
        started = time.monotonic()
        self.note_fault()
        self._gateway().kill()
        while not await asyncio.to_thread(self._gateway_answers):
            self.note_fault()  # it may be away for longer than a fault excuses
            assert time.monotonic() < started + RECOVERY_BOUND_S, "the gateway does not come back"
            await asyncio.sleep(0.2)
        self.note_fault()
        self.recovery_s.setdefault("kill_gateway", []).append(time.monotonic() - started)

    async def break_redis(self, peer: RedisPeer) -> None:
        """Kills it and brings it back, empty, whatever else is broken: the gateway goes on without it."""
        peer.kill()
        await asyncio.sleep(self.rng.uniform(0.5, 3.0))
        await asyncio.to_thread(peer.start)
        self.redis_kills += 1

    async def kill_engine(self) -> None:
        self._engine().kill()

    async def stop_engine(self) -> None:
        engine = self._engine()
        engine.suspend()
        await asyncio.sleep(self.rng.uniform(0.2, 2.0))
        engine.resume()

    async def kill_stub(self) -> None:
        for stub in self.server.stubs(self.model):
            psutil.Process(stub.pid).kill()
        # The launcher looks every half second, twice, and loads the model.
        await asyncio.sleep(1.0)

    async def reload(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.server.unload, self.model)
        await loop.run_in_executor(None, self.server.load, self.model)

    def _gateway_answers(self) -> bool:
        try:
            return HTTP.get(f"{self.server.gateway}/live", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _gateway(self) -> psutil.Process:
        (pid,) = [pid for pid, words in self.server.processes().items() if "flashserve_gateway" in words]
        return psutil.Process(pid)

    def _engine(self) -> psutil.Process:
        return engine_of(self.server, self.model)

    async def _until_it_answers(self) -> None:
        deadline = time.monotonic() + RECOVERY_BOUND_S
        async with AsyncClient(f"grpc://{self.server.grpc}", model=self.model) as client:
            while True:
                try:
                    await client.generate("def ", max_tokens=1, timeout_s=2)
                    return
                except FlashserveError as error:
                    assert time.monotonic() < deadline, f"it does not answer again: {error}"
                    await asyncio.sleep(0.1)


@dataclass(frozen=True)
class State:
    """What must not have grown."""

    processes: int
    descriptors: int
    shared_memory: int
    """Files."""
    memory: dict[str, int]
    """Bytes by kind of process."""

    @classmethod
    def of(cls, server: Server) -> State:
        memory: dict[str, int] = {}
        descriptors = 0
        for pid, words in server.processes().items():
            process = psutil.Process(pid)
            line = " ".join(words)
            kinds = ("flashserve.engine", "flashserve_gateway", "stub", "tritonserver")
            kind = next((kind for kind in kinds if kind in line), "launcher")
            memory[kind] = memory.get(kind, 0) + process.memory_full_info().uss
            descriptors += process.num_fds()
        assert server.launcher is not None
        own = f"flashserve-{server.launcher.pid}-"
        shared = [name for name in os.listdir("/dev/shm") if name.startswith(own)]
        return cls(len(server.processes()), descriptors, len(shared), memory)


def leftovers(server: Server, model: str) -> list[str]:
    """Requests that still run or wait, and blocks that are held."""
    text = HTTP.get(server.metrics).text
    found = []
    for line in text.splitlines():
        name = line.split("{")[0]
        gauges = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        if name in gauges and f'model_name="{model}"' in line and float(line.split()[-1]) != 0:
            found.append(line)
    return found
