"""Models come and go while the server runs: with requests in flight, under traffic, and again and again."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_requests import alive, engine_of, errors_of, read, shared_memory, until
from flashserve_client import AsyncClient, Cancelled, Unavailable
from harness import Server
from null_models import null_model, write_null_model
from requests_helper import COUNTERS_WITHIN_S

DRAIN_S = 1.0
GONE_S = 10.0
GROWTH_BOUND = 24 << 20  # of tritonserver's memory, by seven loads and unloads: 3 MB each would be a leak


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_null_model(tmp_path_factory.mktemp("models") / "null")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server({"demo": null_model(folder, 5, drain_timeout_s=DRAIN_S)}) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"grpc://{server.grpc}", model="demo") as client:
        yield client


def processes(server: Server) -> list[psutil.Process]:
    """The stub and the engine of a model with one instance."""
    return [psutil.Process(server.stubs("demo")[0].pid), engine_of(server, "demo")]


async def gone(old: list[psutil.Process]) -> None:
    await until(lambda: not any(map(alive, old)), "stub and engine have ended", GONE_S)


async def in_thread(function: Any, *args: Any) -> None:
    await asyncio.get_running_loop().run_in_executor(None, function, *args)


async def streaming(client: AsyncClient, **options: Any) -> asyncio.Task[str]:
    """A request that has run for 0.2 s."""
    texts: list[str] = []
    task = asyncio.create_task(read(client, texts=texts, **options))
    await until(lambda: sum(map(len, texts)) >= 40, "40 tokens have come")
    return task


async def unload_right_after_a_stream(server: Server, client: AsyncClient) -> None:
    assert len(await read(client, max_tokens=20)) == 20
    old = processes(server)
    server.unload("demo")
    await gone(old)
    server_has_no_model_process(server)
    with pytest.raises(KeyError):
        server.metric("flashserve:engine_ready", model="demo")
    await in_thread(server.load, "demo")


async def unload_with_requests_in_flight(server: Server, client: AsyncClient) -> None:
    endless, short = await streaming(client), await streaming(client, max_tokens=100)
    old = processes(server)
    server.unload("demo")
    with pytest.raises(Unavailable):
        await client.generate("hello")
    assert len(await short) == 100
    (error,) = await errors_of([endless], DRAIN_S + 2)
    assert type(error) is Cancelled and error.reason == "shutdown"
    assert error.partial is not None and len(error.partial.text) > 100
    await gone(old)
    server_has_no_model_process(server)
    await in_thread(server.load, "demo")


async def load_again_at_once(server: Server, client: AsyncClient) -> None:
    """The old instance's requests are not disturbed by the new one."""
    running = await streaming(client, max_tokens=100)
    old = processes(server)
    server.unload("demo")
    await in_thread(server.load, "demo")
    assert len(await running) == 100
    await gone(old)


def server_has_no_model_process(server: Server) -> None:
    words = [" ".join(line) for line in server.processes().values()]
    assert not [line for line in words if "python_backend_stub" in line or "flashserve.engine" in line]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ten_times_nothing_piles_up(server: Server, client: AsyncClient) -> None:
    ways = (unload_right_after_a_stream, unload_with_requests_in_flight, load_again_at_once)
    tritonserver = psutil.Process(server.tritonserver_pids()[0])
    shared = len(shared_memory(server))
    before = 0
    for round_number in range(10):
        if round_number == 3:  # each way once is the warm-up
            before = tritonserver.memory_info().rss
        await ways[round_number % len(ways)](server, client)
        assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3
    growth = tritonserver.memory_info().rss - before
    print(f"tritonserver: {before >> 20} MB, grown by {growth >> 10} kB in 7 rounds")
    assert growth < GROWTH_BOUND
    assert len(shared_memory(server)) == shared
    assert len(server.stubs()) == 1


async def test_a_reload_under_traffic_loses_no_request(server: Server, client: AsyncClient, folder: Path) -> None:
    old = processes(server)
    reloaded = asyncio.Event()

    async def keep_asking() -> int:
        answers = 0
        while not reloaded.is_set():
            assert len(await read(client, max_tokens=30)) == 30
            answers += 1
        return answers

    traffic = [asyncio.create_task(keep_asking()) for _ in range(4)]
    server.add_model("demo", null_model(folder, 4, drain_timeout_s=DRAIN_S))  # Triton reloads what has changed
    await in_thread(server.load, "demo")
    reloaded.set()
    assert all(count > 1 for count in await asyncio.gather(*traffic))
    await gone(old)
    assert len(server.stubs()) == 1
    await has_metrics(server, client)


async def has_metrics(server: Server, client: AsyncClient) -> None:
    """The series are there and alive: those that the old instance takes along must not be the new one's."""

    def tokens() -> float:
        with contextlib.suppress(KeyError):
            return server.metric("vllm:generation_tokens_total", model="demo")
        return -1

    await until(lambda: tokens() >= 0, "the reloaded model has metrics", 3)
    await asyncio.sleep(COUNTERS_WITHIN_S)
    before = tokens()
    await read(client, max_tokens=20)
    await until(lambda: tokens() == before + 20, "they count", 3)


async def test_an_engine_that_hangs_does_not_hold_up_an_unload(server: Server, client: AsyncClient) -> None:
    running = await streaming(client)
    old = processes(server)
    old[1].suspend()
    server.unload("demo")
    (error,) = await errors_of([running], DRAIN_S + 4)
    assert type(error) is Cancelled and error.reason == "shutdown"
    await gone(old)
    await in_thread(server.load, "demo")
    assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3


async def test_leaving_a_stream_at_its_finish_reason_or_error_does_not_hold_up_an_unload(
    server: Server, client: AsyncClient
) -> None:
    """Triton 2.51 loses a request that is cancelled within a millisecond of its end; our client lets it end."""
    for _ in range(20):
        async with client.stream("hello", max_tokens=2) as stream:
            async for delta in stream:
                if delta.finish_reason is not None:
                    break
        with pytest.raises(ValueError, match="top_p"):
            await client.generate("hello", top_p=7)
    old = processes(server)
    server.unload("demo")
    await gone(old)
    assert "does not finalize this model" not in server.log
    await in_thread(server.load, "demo")
