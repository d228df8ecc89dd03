"""OpenAI's own client, unchanged, against the gateway that the launcher starts in front of a real tritonserver."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from harness import HTTP, Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import wait_idle
from shared_servers import REAL, letters
from tiny_models import make_tiny_model

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    null = str(write_null_model(folder / "null"))
    models = {
        "llama": {"model": str(make_tiny_model("llama", folder / "llama")), **REAL, "max_num_seqs": 8},
        "letters": null_model(Path(null)),
        "paced": null_model(Path(null), 5),
        "narrow": null_model(Path(null), 5, max_num_seqs=1, max_waiting_requests=2),
    }
    with Server(models, gateway=True, ready_timeout_s=110) as running:
        wait_answers(running)
        yield running


def gateway_pid(server: Server) -> int | None:
    found = [pid for pid, words in server.processes().items() if "flashserve_gateway" in words]
    return found[0] if found else None


def wait_answers(server: Server) -> None:
    def ready() -> bool:
        try:
            return HTTP.get(f"{server.gateway}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    assert wait_until(ready, 30), server.log[-4000:]


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.gateway}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


# --- answers -----------------------------------------------------------------------------------------------------


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI):
    settings = {"model": "llama", "messages": MESSAGES, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    text, usage, reasons = "", None, []
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert text == whole.choices[0].message.content
    assert reasons == [whole.choices[0].finish_reason]
    assert whole.usage is not None and usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_completions_of_text_and_ids(client: openai.OpenAI):
    answer = client.completions.create(model="letters", prompt=[[1, 2, 3], [1, 2, 3, 4]], max_tokens=8)
    assert [choice.text for choice in answer.choices] == [letters(3, 8), letters(4, 8)]
    settings = {"model": "llama", "max_tokens": 8, "temperature": 0, "extra_body": {"ignore_eos": True}}
    ids = httpx.post(
        str(client.base_url.join("/tokenize")), json={"model": "llama", "prompt": "def f"}, trust_env=False
    ).json()["tokens"]
    of_text = client.completions.create(prompt="def f", **settings)
    of_ids = client.completions.create(prompt=ids, **settings)
    assert of_text.choices[0].text == of_ids.choices[0].text


def test_characters_that_span_tokens_arrive_whole(client: openai.OpenAI):
    """A null device's tokens behind the letters are bytes that begin no character."""
    settings = {"model": "paced", "prompt": [1] * 50, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**settings).choices[0].text
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)]
    assert "".join(pieces) == whole
    assert "\ufffd" in whole and len(pieces) > 1


def test_samples_differ_by_seed_and_come_again(client: openai.OpenAI):
    settings = {"model": "llama", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.5, "seed": 3, "n": 3}
    first, again = (
        [choice.message.content for choice in client.chat.completions.create(**settings).choices] for _ in range(2)
    )
    assert first == again and len(set(first)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**settings, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == first


def test_a_stop_string_never_shows(client: openai.OpenAI):
    stop = letters(3, 20)[5:7]
    settings = {"model": "letters", "prompt": [1, 2, 3], "max_tokens": 20, "stop": [stop]}
    for text in (
        client.completions.create(**settings).choices[0].text,
        "".join(chunk.choices[0].text for chunk in client.completions.create(**settings, stream=True)),
    ):
        assert text == letters(3, 5)


async def test_64_chats_of_the_async_client_each_get_their_own_answer(server: Server):
    async with openai.AsyncOpenAI(base_url=f"{server.gateway}/v1", api_key="none", max_retries=0) as client:

        async def one(index: int) -> bool:
            prompt, count = [5] * (1 + index % 8), 4 + index % 16
            stream = await client.completions.create(model="letters", prompt=prompt, max_tokens=count, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream]) == letters(len(prompt), count)

        assert all(await asyncio.gather(*map(one, range(64))))


# --- errors ------------------------------------------------------------------------------------------------------


def test_errors_have_the_types_of_openais_client(client: openai.OpenAI):
    asks = client.chat.completions
    with pytest.raises(openai.NotFoundError):
        asks.create(model="nope", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as raised:
        asks.create(model="llama", messages=MESSAGES, temperature=-1)
    assert raised.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="letters", prompt=[1] * 5000)
    assert raised.value.code == "context_length_exceeded"
    image = {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}
    with pytest.raises(openai.BadRequestError) as raised:
        asks.create(model="llama", messages=[{"role": "user", "content": [image]}])
    assert raised.value.param == "messages[0].content[0]"
    with pytest.raises(openai.BadRequestError, match="log probabilities"):
        asks.create(model="llama", messages=MESSAGES, logprobs=True)


def test_a_full_queue_is_waited_for_and_then_says_when_to_come_again(server: Server, client: openai.OpenAI):
    connections = open_streams(server, "narrow", 3)
    with pytest.raises(openai.InternalServerError, match="queue is full") as raised:
        client.completions.create(model="narrow", prompt=[1], max_tokens=1)
    assert raised.value.status_code == 503
    assert float(raised.value.response.headers["retry-after"]) > 0
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.completions.create, model="narrow", prompt=[1], max_tokens=2)
        assert wait_until(lambda: "requests_waiting 1.0" in HTTP.get(f"{server.gateway}/metrics").text, 3)
        for connection in connections:
            connection.close()
        assert waiting.result().choices[0].text == letters(1, 2)
    wait_idle(server, "narrow")


# --- clients that leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("model", ["paced", "narrow"])
def test_a_client_that_leaves_frees_its_blocks(server: Server, model: str, stream: str):
    """Of `narrow` three ask and one runs: those that wait leave, too."""
    for connection in open_streams(server, model, 3, stream):
        connection.close()
    wait_idle(server, model)


def open_streams(server: Server, model: str, number: int, stream: str = "true") -> list[socket.socket]:
    """Requests of many seconds, whose connections are to be closed."""
    host, port = server.gateway.removeprefix("http://").split(":")
    body = f'{{"model": "{model}", "prompt": [1, 2], "max_tokens": 4000, "stream": {stream}}}'
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head = "\r\n".join([*lines, f"Content-Length: {len(body)}"])
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    connections = [socket.create_connection((host, int(port))) for _ in range(number)]
    for count, connection in enumerate(connections, 1):  # one by one: three at once may find the queue of two full
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        assert wait_until(lambda: sum(server.metric(name, model=model) for name in names) == count, 5)  # noqa: B023
    return connections


# --- the process -------------------------------------------------------------------------------------------------


def test_a_gateway_that_dies_is_started_anew(server: Server, client: openai.OpenAI):
    before = gateway_pid(server)
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert wait_until(lambda: gateway_pid(server) not in (None, before), 15)
    wait_answers(server)
    assert client.completions.create(model="letters", prompt=[1], max_tokens=4).choices[0].text == letters(1, 4)


def test_a_port_that_is_taken_says_what_to_do(server: Server, tmp_path: Path):
    taken = server.gateway.rsplit(":", 1)[1]
    other = Server(
        {"letters": null_model(write_null_model(tmp_path / "null"))}, arguments=["--gateway-port", taken], gateway=True
    )
    try:
        other.start(wait=False)
        assert other.launcher is not None and other.launcher.wait(30) == 1
        assert f"port {taken} is taken" in other.log and "--no-gateway" in other.log
    finally:
        other.destroy()


def test_streams_end_before_the_gateway_does(tmp_path: Path):
    """A stop lets requests finish: through the gateway, too. And a launcher that is killed takes it along."""
    models = {"paced": null_model(write_null_model(tmp_path / "null"), 5)}
    with Server(models, gateway=True) as server:
        wait_answers(server)
        texts: list[str] = []

        def ask() -> None:
            body = {"model": "paced", "prompt": [1], "max_tokens": 300, "stream": True}
            texts.append(httpx.post(f"{server.gateway}/v1/completions", json=body, trust_env=False, timeout=30).text)

        asking = threading.Thread(target=ask)
        asking.start()
        assert wait_until(lambda: server.metric("vllm:num_requests_running", model="paced") == 1, 5)
        server.stop()
        asking.join()
        assert texts[0].endswith("data: [DONE]\n\n")
    with Server(models, gateway=True) as server:
        wait_answers(server)
        assert server.launcher is not None
        os.kill(server.launcher.pid, signal.SIGKILL)
        server.launcher.wait(10)
        started = time.monotonic()
        assert wait_until(lambda: gateway_pid(server) is None, 10), time.monotonic() - started
        server.assert_nothing_left(within_s=15)
