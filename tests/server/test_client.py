"""The client against a real server, over both protocols; and `flashserve generate` and `chat` on top of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import SOURCES, Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import wait_idle
from shared_servers import letters

from flashserve_client import (
    AsyncClient,
    Client,
    DeadlineExceeded,
    FlashserveError,
    InvalidRequest,
    NotFound,
    Unavailable,
)

PROTOCOLS = ("grpc", "http")


def address(server: Server, protocol: str) -> str:
    return f"grpc://{server.grpc}" if protocol == "grpc" else server.http


@pytest.fixture(params=PROTOCOLS)
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return address(server, request.param)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, model="letters", timeout_s=30) as client:
        yield client


def test_a_model_of_any_plain_name_answers_over_both_protocols(tmp_path: Path):
    name = "a@b+c%41=d:e,f_g-h.i"
    with Server({name: null_model(write_null_model(tmp_path / "null"))}) as server:
        for protocol in PROTOCOLS:
            with Client(address(server, protocol), model=name, timeout_s=30) as client:
                assert client.health().model_ready
                assert client.generate("hello", max_tokens=3).completion_tokens == 3
                assert "".join(delta.text for delta in client.stream("hello", max_tokens=3))
                client.load_model(name)


# --- answers ----------------------------------------------------------------------------------------------------


def test_stream_and_generate_give_the_same_result(client: Client):
    stream = client.stream([1, 2, 3], max_tokens=20)
    deltas = list(stream)
    whole = client.generate([1, 2, 3], max_tokens=20)
    for result in (stream.result, whole):
        assert result.text == letters(3, 20)
        assert (result.prompt_tokens, result.completion_tokens, result.finish_reason) == (3, 20, "length")
        assert result.timings.queue_ms is not None
        assert result.timings.ttft_ms is not None
        assert result.timings.preemptions == 0
    assert "".join(delta.text for delta in deltas) == whole.text
    assert sum(delta.completion_tokens for delta in deltas) == 20
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_slow_stream_comes_token_by_token(client: Client):
    stream = client.stream([1, 2, 3], model="paced", max_tokens=20)
    deltas = list(stream)
    assert len(deltas) >= 15
    assert stream.result.ttft_s < stream.result.latency_s / 2
    assert stream.result.tokens_per_s is not None


def test_a_real_model_answers_alike_over_both_protocols(server: Server):
    texts = set()
    for protocol in PROTOCOLS:
        with Client(address(server, protocol), model="llama") as client:
            settings = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}
            prompt = "def f(x):"
            texts.add(client.generate(prompt, **settings).text)
            texts.add("".join(delta.text for delta in client.stream(prompt, **settings)))
            texts.add(client.generate(client.tokenize(prompt), **settings).text)
    assert len(texts) == 1


def test_stop_strings_and_seeds_reach_the_engine(client: Client):
    assert client.generate([1, 2, 3], max_tokens=20, stop=[letters(3, 20)[5]]).finish_reason == "stop"
    settings = {"model": "llama", "max_tokens": 16, "temperature": 1.5, "seed": 11}
    assert client.generate("a", **settings).text == client.generate("a", **settings).text


def test_messages_go_through_the_models_template(client: Client):
    messages = [{"role": "user", "content": "hello"}]
    chat = client.generate(messages, max_tokens=5)
    assert chat.prompt_tokens == len(client.tokenize(messages))
    assert chat.prompt_tokens > len(client.tokenize("hello"))


def test_tokenize_and_detokenize_are_inverse(client: Client):
    text = "def é():\n    return '你好 😀'"
    assert client.detokenize(client.tokenize(text)) == text


async def test_64_streams_share_one_client(url: str):
    async def one(client: AsyncClient, index: int) -> bool:
        length = 4 + index % 16
        stream = client.stream([5] * (1 + index % 8), max_tokens=length)
        text = "".join([delta.text async for delta in stream])
        return text == letters(1 + index % 8, length)

    async with AsyncClient(url, model="letters") as client:
        assert all(await asyncio.gather(*(one(client, index) for index in range(64))))


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "settings", "kind", "words"),
    [
        ("x", {"temperature": -1}, InvalidRequest, "temperature"),
        ("x", {"no_such_parameter": 1}, InvalidRequest, "no_such_parameter"),
        ("", {}, InvalidRequest, "empty"),
        ([10**6], {}, InvalidRequest, "1000000"),
        ("x", {"model": "missing"}, NotFound, "missing"),
    ],
)
def test_refusals_are_typed(client: Client, prompt, settings, kind, words):
    for work in (client.generate, lambda *args, **kwargs: list(client.stream(*args, **kwargs))):
        with pytest.raises(kind, match=words) as caught:
            work(prompt, **settings)
        assert "[code=" not in str(caught.value)


def test_a_deadline_delivers_what_there_is(client: Client):
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        list(client.stream([1, 2, 3], model="paced", max_tokens=500, ignore_eos=True, timeout_s=0.4))
    assert time.monotonic() - started < 1.2, "the server's own answer, before the client gives up"
    assert caught.value.reason == "deadline"
    assert caught.value.partial.completion_tokens > 10
    with pytest.raises(DeadlineExceeded):
        client.generate([1, 2, 3], model="paced", max_tokens=500, ignore_eos=True, timeout_s=0.2)


async def test_a_full_queue_is_unavailable_and_retries_get_through(url: str, server: Server):
    async with AsyncClient(url, model="narrow") as client, AsyncClient(url, model="narrow", retries=20) as patient:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(client.stream([1], max_tokens=900, ignore_eos=True))
            await first.__anext__()
            waiting = [asyncio.create_task(client.generate([1], max_tokens=2)) for _ in range(2)]
            while server.metric("vllm:num_requests_waiting", model="narrow") < 2:
                await asyncio.sleep(0.02)
            with pytest.raises(Unavailable, match="queue is full") as caught:
                await client.generate([1], max_tokens=2)
            assert caught.value.retry_after_ms > 0
            assert (await client.health()).engine_ready, "busy is not dead"
            refused = asyncio.create_task(patient.generate([1], max_tokens=2))
            await asyncio.sleep(0.1)
        assert (await refused).completion_tokens == 2
        for result in await asyncio.gather(*waiting):
            assert result.completion_tokens == 2


def test_health(client: Client, url: str):
    health = client.health()
    assert (health.server_live, health.model_ready, health.engine_ready, health.detail) == (True, True, True, "ok")
    health = client.health(model="missing")
    assert (health.server_live, health.model_ready, health.engine_ready) == (True, False, False)
    assert {"letters", "llama"} <= {model.name for model in client.models() if model.state == "READY"}


# --- leaving ----------------------------------------------------------------------------------------------------


def test_leaving_a_stream_frees_its_blocks(client: Client, server: Server):
    settings = {"model": "paced", "max_tokens": 2000, "ignore_eos": True, "timeout_s": 60}
    with client.stream([1, 2, 3], **settings) as stream:
        next(stream)
    wait_idle(server, "paced")
    for _ in client.stream([1, 2, 3], **settings):
        break
    wait_idle(server, "paced")


async def test_cancelling_a_task_frees_its_blocks(url: str, server: Server):
    async with AsyncClient(url, model="paced") as client:

        async def consume() -> None:
            async for _ in client.stream([1, 2, 3], max_tokens=2000, ignore_eos=True):
                pass

        tasks = [asyncio.create_task(consume()) for _ in range(8)]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(wait_idle, server, "paced")


async def test_cancelling_generate_over_grpc_frees_its_blocks(server: Server):
    """Over HTTP Triton does not tell the backend: there the deadline ends it."""
    async with AsyncClient(f"grpc://{server.grpc}", model="paced") as client:
        task = asyncio.create_task(client.generate([1], max_tokens=2000, ignore_eos=True))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.to_thread(wait_idle, server, "paced")


# --- the engine's life ------------------------------------------------------------------------------------------


def engine_pids(server: Server) -> list[int]:
    return [pid for pid, words in server.processes().items() if "flashserve.engine" in words]


def test_health_follows_the_engine_and_models_come_and_go(tmp_path):
    folder = write_null_model(tmp_path / "null")
    with Server({"m": null_model(folder, 1)}) as server, contextlib.ExitStack() as stack:
        over_grpc, over_http = clients = [
            stack.enter_context(Client(address(server, protocol), model="m")) for protocol in PROTOCOLS
        ]
        streams = [client.stream("x", max_tokens=4000, ignore_eos=True) for client in clients]
        for stream in streams:
            next(stream)
        for pid in engine_pids(server):
            os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(Unavailable):
                list(stream)
        for client in clients:
            health = client.health()
            assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, False)
            assert "engine" in health.detail
        for client in clients:
            assert wait_until(lambda: client.health().engine_ready, 30)  # noqa: B023
            assert client.generate("x", max_tokens=1).completion_tokens == 1

        over_grpc.unload_model("m")
        for client in clients:
            assert wait_until(lambda: not client.health().model_ready, 10)  # noqa: B023
            with pytest.raises(FlashserveError):
                client.generate("x", max_tokens=1)
        over_http.load_model("m")
        for client in clients:
            assert client.generate("x", max_tokens=1).completion_tokens == 1


# --- commands ---------------------------------------------------------------------------------------------------


def flashserve(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashserve.cli", *words],
        input=text,
        env={**os.environ, "PYTHONPATH": ":".join(SOURCES)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_flashserve_generate(url: str):
    done = flashserve("generate", "abc", "--url", url, "--model", "letters", "--max-tokens", "5", "--stats")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) == 6
    assert "5 generated" in done.stderr
    done = flashserve("generate", "--url", url, "--model", "missing", text="abc")
    assert (done.returncode, done.stdout) == (1, "")
    assert "missing" in done.stderr


def test_flashserve_chat(url: str):
    done = flashserve("chat", "--url", url, "--model", "letters", "--max-tokens", "5", text="hello\nagain\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
