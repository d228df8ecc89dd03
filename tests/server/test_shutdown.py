"""The end of a server with real engines in mid-stream: what clients are told, how long it takes, what is left."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from async_requests import errors_of, read, until
from flashserve_client import AsyncClient, Cancelled, ConnectionFailed, FlashserveError
from harness import Server
from null_models import MetricsReader, null_model, write_null_model

DRAIN_S = 2.0
END_S = 10.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = write_null_model(tmp_path / "null")
    one = null_model(folder, 5, max_num_seqs=2, drain_timeout_s=DRAIN_S)
    server = Server({"demo": one, "idle": null_model(folder)}, arguments=["--max-restarts", "0"])
    try:
        yield server.start()
    finally:
        server.destroy()


async def under_load(server: Server, client: AsyncClient) -> dict[str, asyncio.Task[str]]:
    """Two requests run, a long one and one that is as good as endless; a third waits."""
    metrics = MetricsReader(server.metrics, "demo")
    tasks = {"long": asyncio.create_task(read(client, max_tokens=250)), "endless": asyncio.create_task(read(client))}
    await until(lambda: metrics.requests() == (2, 0), "two requests run")
    tasks["waiting"] = asyncio.create_task(read(client, max_tokens=50))
    await until(lambda: metrics.requests() == (2, 1), "one waits")
    metrics.close()
    return tasks


async def assert_drained(tasks: dict[str, asyncio.Task[str]]) -> None:
    """What can finish in time finishes, what waited included; the rest is told why it ends."""
    errors = dict(zip(tasks, await errors_of(list(tasks.values()), DRAIN_S + 2), strict=True))
    assert (errors["long"], errors["waiting"]) == (None, None)
    assert (len(tasks["long"].result()), len(tasks["waiting"].result())) == (250, 50)
    error = errors["endless"]
    assert type(error) is Cancelled and error.reason == "shutdown"
    assert error.partial is not None and len(error.partial.text) > 250


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_ctrl_c_and_sigterm_drain_and_end_in_time(server: Server, number: signal.Signals) -> None:
    assert server.launcher is not None
    async with AsyncClient(f"grpc://{server.grpc}", model="demo") as client:
        tasks = await under_load(server, client)
        started = time.monotonic()
        server.launcher.send_signal(number)
        await assert_drained(tasks)
        with pytest.raises(FlashserveError):
            await client.generate("hello", max_tokens=1, timeout_s=1)
    assert server.launcher.wait(END_S) == 0
    assert time.monotonic() - started <= END_S
    assert "the rest was killed" not in server.log
    server.assert_nothing_left(within_s=0.5)


async def test_a_killed_launcher_drains_too_and_leaves_nothing(server: Server) -> None:
    assert server.launcher is not None
    async with AsyncClient(f"grpc://{server.grpc}", model="demo") as client:
        tasks = await under_load(server, client)
        server.launcher.kill()
        await assert_drained(tasks)
    server.launcher.wait(5)
    server.assert_nothing_left(within_s=END_S)


async def test_a_killed_tritonserver_ends_the_launcher_and_leaves_nothing(server: Server) -> None:
    assert server.launcher is not None
    async with AsyncClient(f"grpc://{server.grpc}", model="demo") as client:
        tasks = await under_load(server, client)
        psutil.Process(server.tritonserver_pids()[0]).kill()
        errors = await errors_of(list(tasks.values()), 2)
        assert [type(error) for error in errors] == [ConnectionFailed] * 3
    assert server.launcher.wait(END_S) == 1
    assert "tritonserver ended by itself with code -9" in server.log
    server.assert_nothing_left(within_s=0.5)
