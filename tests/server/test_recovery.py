"""Processes that die or hang: who is told what, how soon, and that it all comes back by itself."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_requests import FAR_AWAY, alive, cancel, engine_of, errors_of, read, shared_memory, until
from flashserve_client import AsyncClient, DeadlineExceeded, Timeout, Unavailable, grpc_transport
from harness import HTTP, Server, wait_until
from null_models import MetricsReader, null_model, write_null_model

AT_ONCE_S = 1.0
LOAD_TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_null_model(tmp_path_factory.mktemp("models") / "null")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server({"victim": null_model(folder, 5, max_num_seqs=2), "other": null_model(folder, 5)}) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(f"grpc://{server.grpc}", model="victim") as client:
        yield client


@pytest.fixture
async def sse(server: Server) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.http, model="victim") as client:
        yield client


@pytest.fixture
def metrics(server: Server) -> Iterator[MetricsReader]:
    reader = MetricsReader(server.metrics, "victim")
    yield reader
    reader.close()


def engine_ready(metrics: MetricsReader) -> bool:
    return metrics.read()["flashserve:engine_ready"] == 1


def restarts(metrics: MetricsReader) -> int:
    return int(metrics.read()["flashserve:engine_restarts_total"])


async def test_requests_of_a_killed_engine_fail_at_once_and_the_next_one_works(
    server: Server, client: AsyncClient, sse: AsyncClient, metrics: MetricsReader
) -> None:
    bystanders = server.tritonserver_pids(), server.stubs()
    engine, before = engine_of(server, "victim"), restarts(metrics)
    running: list[list[str]] = [[], []]
    tasks = [asyncio.create_task(read(one, texts=texts)) for one, texts in zip((client, sse), running, strict=True)]
    await until(lambda: all(running), "two requests run")
    waiting = [asyncio.create_task(read(client)), asyncio.create_task(sse.generate("hello", max_tokens=FAR_AWAY))]
    await until(lambda: metrics.requests() == (2, 2), "two others wait")

    engine.kill()
    errors = await errors_of([*tasks, *waiting], AT_ONCE_S)
    assert [type(error) for error in errors] == [Unavailable] * 4
    assert all(error.retry_after_ms > 0 and "was killed by signal 9" in error.message for error in errors)
    assert [error.partial.text for error in errors[:2]] == ["".join(texts) for texts in running]
    await until(lambda: not engine_ready(metrics), "the gauge says that there is no engine", AT_ONCE_S)
    assert metrics.is_idle()
    health = await client.health()
    assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, False)
    with pytest.raises(Unavailable) as refused:
        await client.generate("hello")
    assert 0 < refused.value.retry_after_ms < 1000 * LOAD_TIMEOUT_S

    await until(lambda: engine_ready(metrics), "a new engine is ready", LOAD_TIMEOUT_S)
    assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3
    assert (await client.health()).engine_ready
    assert engine_of(server, "victim") != engine
    assert (server.tritonserver_pids(), server.stubs()) == bystanders
    await until(lambda: restarts(metrics) == before + 1, "the restart is counted")


async def test_a_death_without_requests_is_noticed_and_disturbs_no_other_model(
    server: Server, metrics: MetricsReader
) -> None:
    async with AsyncClient(f"grpc://{server.grpc}", model="other", retries=5) as client:
        texts: list[str] = []
        bystander = asyncio.create_task(read(client, texts=texts))
        await until(lambda: bool(texts), "the other model streams")
        engine_of(server, "victim").kill()
        await until(lambda: not engine_ready(metrics), "it is noticed", AT_ONCE_S)
        sent = len(texts)
        # Retrying as the errors tell is enough to get over it.
        answer = await client.generate("hello", model="victim", max_tokens=3, timeout_s=LOAD_TIMEOUT_S)
        assert answer.completion_tokens == 3
        assert len(texts) > sent and not bystander.done()
        await cancel(bystander)


async def test_a_stopped_engine_runs_into_the_clients_timeouts_and_goes_on_when_it_is_let(
    server: Server, client: AsyncClient, sse: AsyncClient, metrics: MetricsReader
) -> None:
    texts: list[str] = []
    streaming = asyncio.create_task(read(client, texts=texts, max_tokens=200))
    await until(lambda: bool(texts), "a request streams")
    engine = engine_of(server, "victim")
    engine.suspend()
    try:
        timeouts = [
            asyncio.create_task(one.generate("hello", max_tokens=FAR_AWAY, timeout_s=0.2)) for one in (client, sse)
        ]
        health = await client.health(timeout_s=1.5)
        assert (health.model_ready, health.engine_ready) == (True, False)
        # The stub keeps the deadline in the engine's place; whichever side is first.
        assert {type(error) for error in await errors_of(timeouts, 3)} <= {Timeout, DeadlineExceeded}
        assert not streaming.done()
    finally:
        engine.resume()
    assert len(await streaming) == 200
    await until(metrics.is_idle, "all blocks are free")
    assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3


async def test_a_killed_stub_takes_its_engine_along_and_the_launcher_brings_the_model_back(
    server: Server, client: AsyncClient, metrics: MetricsReader
) -> None:
    texts: list[str] = []
    lost = asyncio.create_task(read(client, texts=texts, timeout_s=1.0))
    await until(lambda: bool(texts), "a request streams")
    engine, (stub,), bystander = engine_of(server, "victim"), server.stubs("victim"), server.stubs("other")
    # A stub killed in the microseconds in which it holds a lock of shared memory takes tritonserver 2.51 along: it
    # ends by boost's lock_exception. With nothing to send and no gauge that changes, this one holds none.
    engine.suspend()
    sent = 0
    while sent < len(texts):
        sent = len(texts)
        await asyncio.sleep(0.2)
    psutil.Process(stub.pid).kill()
    await until(lambda: not alive(engine), "the engine ends with its stub", AT_ONCE_S)
    # Triton never answers a request in flight on a dead stub: the client's own timeout has to end it.
    assert [type(error) for error in await errors_of([lost], 3)] == [Timeout]
    server.wait_for_log(r"model victim: ready again", LOAD_TIMEOUT_S)
    assert (await client.generate("hello", max_tokens=3)).completion_tokens == 3
    assert server.stubs("other") == bystander
    assert server.stubs("victim") not in ([], [stub])
    await until(metrics.is_idle, "all blocks are free")


async def test_a_model_whose_request_triton_has_lost_ends_itself_and_can_be_loaded_again(
    server: Server, client: AsyncClient, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 2.51 loses a request that is cancelled within a millisecond of its end, and never finalizes its model."""
    monkeypatch.setattr(grpc_transport, "_END_TIMEOUT_S", 0)  # our client would wait for the end
    server.add_model("lost", null_model(folder, 1))
    server.load("lost")
    for _ in range(200):
        async with client.stream("hello", model="lost", max_tokens=1) as stream:
            async for delta in stream:
                if delta.finish_reason is not None:
                    break
    (stub,) = server.stubs("lost")
    engine = engine_of(server, "lost")
    server.unload("lost")
    await until(lambda: not alive(engine) and not server.stubs("lost"), "stub and engine have ended")
    if "does not finalize this model" not in server.log:
        pytest.skip("this Triton has lost no request")
    metrics = MetricsReader(server.metrics, "lost")
    assert metrics.read()["flashserve:engine_ready"] == 0
    await asyncio.get_running_loop().run_in_executor(None, server.load, "lost")
    assert server.stubs("lost") not in ([], [stub])
    await until(lambda: metrics.read()["flashserve:engine_ready"] == 1, "the new one is ready")
    assert (await client.generate("hello", model="lost", max_tokens=3)).completion_tokens == 3
    metrics.close()


# --- models that cannot load ---------------------------------------------------------------------------------


def broken_models(folder: Path, parent: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """By name: a model.json that cannot be served, and words of the reason that must be given."""

    def copy(name: str, **files: bytes | None) -> dict[str, Any]:
        target = parent / name
        target.mkdir()
        for file in folder.iterdir():
            content = files.get(file.name.replace(".", "_"), file.read_bytes())
            if content is not None:
                (target / file.name).write_bytes(content)
        return {"model": str(target), "device": "cpu", "num_threads": 1}

    config = json.loads((folder / "config.json").read_text())
    foreign = json.dumps({**config, "architectures": ["MambaForCausalLM"]}).encode()
    return {
        "no-weights": (copy("no-weights", model_safetensors=None), "holds no *.safetensors file"),
        "cut-weights": (
            copy("cut-weights", model_safetensors=struct.pack("<Q", 900) + b"{"),
            "not a valid safetensors",
        ),
        "other-weights": (copy("other-weights"), "the weights lack the tensor"),
        "foreign": (copy("foreign", config_json=foreign), "architecture not supported: MambaForCausalLM"),
        "misspelt": ({"model": str(folder), "max_model_length": 5}, "did you mean max_model_len?"),
    }


def test_a_model_that_cannot_load_says_why_and_leaves_nothing_running(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    before, shared = set(server.processes()), shared_memory(server)
    models = broken_models(folder, tmp_path)
    for name, (model_json, _) in models.items():
        server.add_model(name, model_json)

    def load(name: str) -> str:
        response = HTTP.post(f"{server.http}/v2/repository/models/{name}/load", json={}, timeout=60)
        assert response.status_code == 400, response.text
        return str(response.json()["error"])

    with ThreadPoolExecutor(len(models)) as pool:
        reasons = dict(zip(models, pool.map(load, models), strict=True))
    for name, (_, words) in models.items():
        assert words in reasons[name], f"{name}: {reasons[name]}"
        assert "Traceback" not in reasons[name]
    assert wait_until(lambda: set(server.processes()) == before, 5), server.processes()
    assert shared_memory(server) == shared
