"""OpenAI's own client, unchanged, against the gateway that the launcher starts in front of a real tritonserver."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "size": {"enum": ["small", "large"]}},
    "required": ["city", "size"],
    "additionalProperties": False,
}


def test_an_answer_keeps_to_its_schema(client: openai.OpenAI):
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": PLACE}}
    ask = {"model": "llama", "messages": MESSAGES, "max_tokens": 200, "response_format": wanted, "temperature": 1}
    choice = client.chat.completions.create(**ask).choices[0]
    streamed = client.chat.completions.create(**ask, stream=True)
    texts = [choice.message.content, "".join(chunk.choices[0].delta.content or "" for chunk in streamed)]
    for answer in map(json.loads, texts):
        assert set(answer) == {"city", "size"} and answer["size"] in ("small", "large")
    assert choice.finish_reason == "stop"


def test_a_tool_that_must_be_called_is(client: openai.OpenAI):
    tool = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
    ask = {"model": "llama", "messages": MESSAGES, "max_tokens": 300, "tools": [tool], "parallel_tool_calls": False}
    choice = client.chat.completions.create(**ask, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0].function
    assert call.name == "weather" and set(json.loads(call.arguments)) == {"city", "size"}


def test_a_schema_that_cannot_be_held_is_refused_while_others_stream(client: openai.OpenAI):
    stream = client.chat.completions.create(model="llama", messages=MESSAGES, max_tokens=200, stream=True)
    next(iter(stream))
    wanted = {"type": "json_schema", "json_schema": {"name": "no", "schema": {"not": {"type": "null"}}}}
    with pytest.raises(openai.BadRequestError, match=r"the schema is refused: Unimplemented keys"):
        client.chat.completions.create(model="llama", messages=MESSAGES, response_format=wanted)
    assert list(stream)[-1].choices[0].finish_reason in ("stop", "length")


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


def test_embeddings_are_alike_in_both_encodings_and_do_not_depend_on_company(client: openai.OpenAI):
    """OpenAI's client asks for base64 unless told otherwise, and decodes it."""
    inputs = ["def f(", "a red fox sleeps " * 20, "x"]
    together = client.embeddings.create(model="llama", input=inputs)
    assert together.usage.prompt_tokens == together.usage.total_tokens > len(inputs)
    for text, item in zip(inputs, together.data, strict=True):
        alone = client.embeddings.create(model="llama", input=text, encoding_format="float").data[0]
        assert item.embedding == pytest.approx(alone.embedding, abs=1e-4)
        assert sum(value * value for value in item.embedding) == pytest.approx(1, abs=1e-5)
    assert len(client.embeddings.create(model="llama", input=[[5, 6]], dimensions=7).data[0].embedding) == 7
    with pytest.raises(openai.BadRequestError, match=r"dimensions must be an integer in \[1, 64\]"):
        client.embeddings.create(model="llama", input="a", dimensions=65)


def test_a_stream_says_how_far_its_prompt_is(client: openai.OpenAI):
    stream = client.completions.create(
        model="paced", prompt=[7] * 1500, max_tokens=3, stream=True, extra_body={"return_progress": True}
    )
    told = [chunk.prompt_progress for chunk in stream if hasattr(chunk, "prompt_progress")]
    assert [progress["total"] for progress in told] == [1500] * len(told)
    assert told[-1]["processed"] == 1500


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
    with pytest.raises(openai.BadRequestError, match=r"top_logprobs must be an integer in \[0, 20\], not 21"):
        asks.create(model="llama", messages=MESSAGES, logprobs=True, top_logprobs=21)


def test_log_probabilities(client: openai.OpenAI):
    """Of a chat, whole and streamed, and of a completion that scores its prompt."""
    ask = {
        "model": "llama",
        "messages": MESSAGES,
        "logprobs": True,
        "top_logprobs": 3,
        "max_tokens": 6,
        "temperature": 0,
    }
    (choice,) = client.chat.completions.create(**ask).choices
    content = choice.logprobs.content
    joined = b"".join(bytes(token.bytes) for token in content)
    assert joined.decode() == choice.message.content and len(content) == 6
    assert all(token.top_logprobs[0].token == token.token and len(token.top_logprobs) == 3 for token in content)
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]
    scored = client.completions.create(model="llama", prompt="some text", max_tokens=0, echo=True, logprobs=2)
    (choice,), lists = scored.choices, scored.choices[0].logprobs
    assert (choice.text, scored.usage.completion_tokens) == ("some text", 0)
    assert "".join(lists.tokens) == "some text" and lists.token_logprobs[0] is None
    assert max(lists.token_logprobs[1:]) < 0 and len(lists.tokens) == scored.usage.prompt_tokens


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


# --- models ------------------------------------------------------------------------------------------------------


def test_a_model_of_no_repository_is_loaded_and_unloaded(server: Server, client: openai.OpenAI, tmp_path: Path):
    settings = null_model(write_null_model(tmp_path / "null"))
    weights = settings.pop("model")
    admin = "/v1/admin/models"
    with httpx.Client(base_url=server.gateway, trust_env=False, timeout=30) as http:

        def becomes(name: str, *statuses: str) -> dict[str, Any]:
            row: dict[str, Any] = {}

            def is_there() -> bool:
                row.update(http.get(f"{admin}/{name}").json())
                return row["status"] in statuses

            assert wait_until(is_there, 60), row
            return row

        assert http.post(admin, json={"name": "extra", "model": weights, "settings": settings}).status_code == 202
        row = becomes("extra", "ready", "failed")
        assert row["status"] == "ready", row
        # Its figures come with the next look at the metrics.
        assert wait_until(lambda: http.get(f"{admin}/extra").json()["memory"] is not None, 5)
        memory = http.get(f"{admin}/extra").json()["memory"]
        assert memory["model_bytes"] > 1 << 20 and memory["kv_cache_bytes"] > 1 << 20
        answer = client.completions.create(model="extra", prompt=[1, 2, 3], max_tokens=8)
        assert answer.choices[0].text == letters(3, 8)
        assert "extra" in [model.id for model in client.models.list()]
        assert not (server.repository / "extra").exists()

        assert http.delete(f"{admin}/extra").status_code == 202
        becomes("extra", "unloaded")
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="extra", prompt=[1], max_tokens=1)

        http.post(admin, json={"name": "wrong", "model": str(tmp_path / "none")})
        row = becomes("wrong", "ready", "failed")
        assert row["status"] == "failed" and "does not exist" in row["reason"], row

        assert http.delete(f"{admin}/narrow").status_code == 202
        becomes("narrow", "unloaded")
        assert http.post(admin, json={"name": "narrow"}).status_code == 202
        becomes("narrow", "ready")


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


@pytest.mark.slow
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
