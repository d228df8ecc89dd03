"""Clients that go away: in every state of a request its blocks are free soon after, and nothing is left of it.

A cancellation is measured from the client's call until /metrics says that the blocks are free; that includes up to
50 ms until the gauges are exported. ``pytest -s`` shows the times, 103 ms at the 99th percentile on two cores; the
bounds are for cores that others use as well, and far below the half minute after which a request ends by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc

from async_requests import FAR_AWAY, cancel, read, until
from flashserve_client import AsyncClient
from harness import Server, wait_until
from null_models import MetricsReader, null_model, write_null_model

GRPC_BOUND_S = 3.0
SSE_WAITING_BOUND_S = 6.0  # Triton notices at the next chunk, and a waiting request gets an empty one each second
BURST_BOUND_S = 6.0
LONG_PROMPT = "a b c d e " * 300  # 3,000 tokens: 1.9 s of prefill in model slow
GROWTH_BOUND = 4 << 20  # of a process's memory, by 500 cancellations: 8 kB each would be a leak


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = write_null_model(tmp_path_factory.mktemp("models") / "null")
    models = {
        "slow": null_model(folder, 10, max_num_seqs=2, max_num_batched_tokens=16, enable_prefix_caching=False),
        "tight": null_model(folder, 10, max_model_len=128, num_gpu_blocks_override=8, watermark=0.0),
        "quick": null_model(folder, 1),
    }
    with Server(models) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"grpc://{server.grpc}", model="slow") as client:
        yield client


@pytest.fixture
async def sse(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.http, model="slow") as client:
        yield client


@pytest.fixture
def metrics(server: Server) -> Iterator[Callable[[str], MetricsReader]]:
    readers: list[MetricsReader] = []

    def reader(model: str) -> MetricsReader:
        readers.append(MetricsReader(server.metrics, model))
        return readers[-1]

    yield reader
    for reader in readers:
        reader.close()


async def run_beside(metrics: MetricsReader, *requests: Coroutine[Any, Any, str]) -> list[asyncio.Task[str]]:
    tasks = [asyncio.create_task(request) for request in requests]
    await until(lambda: metrics.requests() == (len(tasks), 0), "the others run")
    return tasks


async def seconds_to_free(
    metrics: MetricsReader, request: Coroutine[Any, Any, Any], state: tuple[int, int], former: tuple[int, int] = (0, 0)
) -> float:
    """Start a request, wait until /metrics shows ``state``, cancel, and measure until it shows ``former`` again.

    state: how many requests run and wait, those of others included.
    """
    task = asyncio.create_task(request)
    await until(lambda: metrics.requests() == state, f"{state} requests run and wait")
    started = time.perf_counter()
    await cancel(task)
    await until(lambda: metrics.requests() == former, "the request is gone")
    if former == (0, 0):
        await until(metrics.is_idle, "all blocks are free")
    return time.perf_counter() - started


@pytest.mark.slow
async def test_over_grpc_its_blocks_are_soon_free_in_every_state(
    client: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    slow, tight = metrics("slow"), metrics("tight")
    before = slow.cancelled(), tight.cancelled()
    seconds: dict[str, list[float]] = {}
    await until(slow.is_idle, "quiet")

    seconds["decoding"] = [await seconds_to_free(slow, read(client), (1, 0)) for _ in range(50)]
    seconds["unary"] = [
        await seconds_to_free(slow, client.generate("hello", max_tokens=FAR_AWAY), (1, 0)) for _ in range(40)
    ]

    texts: list[str] = []
    seconds["prefill"] = [
        await seconds_to_free(slow, read(client, LONG_PROMPT, texts), (1, 0)) for _ in range(50)
    ]  # fmt: skip
    assert not texts

    runners = await run_beside(slow, read(client), read(client))
    seconds["queued"] = [
        await seconds_to_free(slow, request, (2, 1), (2, 0))
        for _ in range(20)
        for request in (read(client), client.generate("hello", max_tokens=FAR_AWAY))
    ]
    await cancel(*runners)

    seconds["preempted"] = [await seconds_to_free_preempted(client, tight) for _ in range(20)]

    everything = sorted(itertools.chain(*seconds.values()))
    assert len(everything) == 200
    for state, values in {**seconds, "all": everything}.items():
        print(f"{state:>9}: {distribution(values)}")
    assert everything[197] <= GRPC_BOUND_S  # the 198th of 200 is their 99th percentile

    await until(lambda: slow.is_idle() and tight.is_idle(), "all blocks are free")
    await until(lambda: (slow.cancelled(), tight.cancelled()) == (before[0] + 182, before[1] + 40), "all are counted")


async def seconds_to_free_preempted(client: AsyncClient, metrics: MetricsReader) -> float:
    """Of two requests for eight blocks, the younger one loses its own once both have grown."""
    await until(metrics.is_idle, "quiet")
    (older,) = await run_beside(metrics, read(client, "hello", model="tight"))
    texts: list[str] = []
    taken = await seconds_to_free(metrics, read(client, "x" * 90, texts, model="tight"), (1, 1), (1, 0))
    assert texts, "it waited for its first token instead of having been preempted"
    await cancel(older)
    return taken


def distribution(seconds: list[float]) -> str:
    ordered = [value * 1000 for value in sorted(seconds)]
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99) - 1)]
    return (
        f"{len(ordered)} cancellations, ms: p50 {statistics.median(ordered):.0f}, p99 {p99:.0f}, max {ordered[-1]:.0f}"
    )


async def test_an_sse_stream_that_is_dropped_is_noticed_at_the_next_chunk(
    sse: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    slow = metrics("slow")
    before = slow.cancelled()
    seconds = [await seconds_to_free(slow, read(sse), (1, 0)) for _ in range(30)]
    print(distribution(seconds))
    assert statistics.median(seconds) <= GRPC_BOUND_S

    runners = await run_beside(slow, read(sse), read(sse))
    seconds = [await seconds_to_free(slow, read(sse), (2, 1), (2, 0)) for _ in range(2)]
    print(f"  waiting: {distribution(seconds)}")
    assert max(seconds) <= SSE_WAITING_BOUND_S
    await cancel(*runners)
    await until(slow.is_idle, "all blocks are free")
    await until(lambda: slow.cancelled() == before + 34, "all are counted")


def test_tritonclient_s_own_stop_stream_ends_the_request(
    server: Server, metrics: Callable[[str], MetricsReader]
) -> None:
    slow = metrics("slow")
    before = slow.cancelled()
    responses: queue.Queue[Any] = queue.Queue()
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        text = tritonclient.grpc.InferInput("text_input", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"hello"], dtype=object))
        stream = tritonclient.grpc.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        client.async_stream_infer("slow", [text, stream])
        assert responses.get(timeout=10).as_numpy("text_output") is not None
        client.stop_stream(cancel_requests=True)
    assert wait_until(slow.is_idle, 5)
    assert wait_until(lambda: slow.cancelled() == before + 1, 5)


async def test_a_closed_iterator_ends_the_request(
    client: AsyncClient, sse: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    slow = metrics("slow")
    before = slow.cancelled()
    for one in (client, sse):
        async with one.stream("hello", max_tokens=FAR_AWAY) as stream:
            async for _ in stream:
                break
        await until(slow.is_idle, "all blocks are free")
    await until(lambda: slow.cancelled() == before + 2, "all are counted")


async def test_200_at_once_leave_a_server_that_works(
    client: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    slow = metrics("slow")
    before = slow.cancelled()
    tasks = [asyncio.create_task(read(client)) for _ in range(200)]
    await until(lambda: sum(slow.requests()) == 200, "200 requests run and wait")
    started = time.perf_counter()
    await cancel(*tasks)
    await until(slow.is_idle, "all blocks are free")
    taken = time.perf_counter() - started
    print(f"200 at once: all blocks are free after {taken * 1000:.0f} ms")
    assert taken < BURST_BOUND_S
    assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3
    await until(lambda: slow.cancelled() == before + 200, "all are counted")


async def test_one_that_meets_the_end_of_its_request_is_counted_once(
    server: Server, sse: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    quick = metrics("quick")
    before, asked_before = ended(quick), asked(quick)
    stubs = server.stubs()
    chance = random.Random(5)
    for _ in range(20):
        lengths = [chance.randrange(1, 12) for _ in range(25)]
        tasks = [asyncio.create_task(read(sse, model="quick", max_tokens=length)) for length in lengths]
        await asyncio.sleep(chance.uniform(0.02, 0.15))
        await cancel(*tasks)
    await until(quick.is_idle, "all blocks are free")
    await until(lambda: ended(quick) - before == asked(quick) - asked_before > 0, "each has ended once")
    assert server.stubs() == stubs
    assert (await sse.generate("hello", model="quick", max_tokens=3)).completion_tokens == 3


def asked(metrics: MetricsReader) -> int:
    """Requests that reached the backend."""
    return round(metrics.read()["nv_inference_request_success"])


def ended(metrics: MetricsReader) -> int:
    """Requests that came to an end, in whatever way."""
    values = metrics.read()
    names = ("vllm:request_success_total", "flashserve:requests_cancelled_total", "flashserve:request_errors_total")
    return round(sum(value for name, value in values.items() if name.startswith(names)))


async def test_500_leave_the_processes_as_large_as_they_were(
    server: Server, client: AsyncClient, metrics: Callable[[str], MetricsReader]
) -> None:
    quick = metrics("quick")

    async def cancel_25() -> None:
        texts: list[list[str]] = [[] for _ in range(25)]
        tasks = [asyncio.create_task(read(client, "x" * 200, seen, model="quick")) for seen in texts]
        await until(lambda: all(texts), "all have a first token")
        await cancel(*tasks)

    async def cancel_many(rounds: int) -> None:
        for _ in range(rounds):
            await cancel_25()
        await until(quick.is_idle, "all blocks are free")

    (stub,) = server.stubs("quick")
    (engine,) = psutil.Process(stub.pid).children()
    processes = {"stub": psutil.Process(stub.pid), "engine": engine}
    await cancel_many(8)
    before = {name: process.memory_info().rss for name, process in processes.items()}
    await cancel_many(20)
    growth = {name: process.memory_info().rss - before[name] for name, process in processes.items()}
    print({name: f"{before[name] >> 20} MB, grown by {grown >> 10} kB" for name, grown in growth.items()})
    assert max(growth.values()) < GROWTH_BOUND
