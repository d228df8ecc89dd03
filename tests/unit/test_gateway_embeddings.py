"""/v1/embeddings as OpenAI's own package sees it, and how far a prompt is, in front of an engine in memory."""

from __future__ import annotations

import asyncio
import base64
import json
import struct

import openai
import pytest

from flashserve_client import InvalidRequest, Unavailable
from flashserve_client.transport import Chunk
from flashserve_gateway.keys import new_key
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import MemoryTransport, fails, gate, piece


def client(url: str, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


async def embeds(asked):
    """Its input's first number or length, then 0.1."""
    given = json.loads(asked.request.strings["embedding_request"])["input"]
    first = len(given) if isinstance(given, str) else given[0]
    yield Chunk(f"[{first}, 0.1]", "stop", len(given), 0, '{"cached_tokens": 2}')


@pytest.fixture
def engine():
    return MemoryTransport(embeds)


@pytest.mark.parametrize(
    ("given", "firsts"),
    [("abc", [3]), (["a", "bcd"], [1, 3]), ([7, 8], [7]), ([[7, 8], [9]], [7, 9]), (["ab", [9]], [2, 9])],
)
async def test_every_form_of_input_in_its_order(engine, given, firsts):
    async with gate(engine) as gateway:
        answer = await client(gateway.url).embeddings.create(model="demo", input=given)
    assert [item.index for item in answer.data] == list(range(len(firsts)))
    assert [item.embedding for item in answer.data] == [pytest.approx([first, 0.1]) for first in firsts]
    total = sum(len(one) for one in (given if isinstance(given, list) and not isinstance(given[0], int) else [given]))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (total, total)
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "demo", "embedding")


async def test_base64_is_little_endian_float32_and_lists_are_numbers(engine):
    async with gate(engine) as gateway:
        ask = {"model": "demo", "input": "abc"}
        coded = (await gateway.http.post("/v1/embeddings", json={**ask, "encoding_format": "base64"})).json()
        plain = (await gateway.http.post("/v1/embeddings", json=ask)).json()
    assert base64.b64decode(coded["data"][0]["embedding"]) == struct.pack("<2f", 3, 0.1)
    assert plain["data"][0]["embedding"] == [3, 0.1]


async def test_what_is_asked_of_the_engine(engine):
    async with gate(engine) as gateway:
        await client(gateway.url).embeddings.create(
            model="demo", input="abc", dimensions=2, user="me",
            extra_body={"pooling": "mean", "normalize": False, "truncate_prompt_tokens": 5, "priority": 3},
        )  # fmt: skip
    (asked,) = engine.asked
    assert json.loads(asked.request.strings["embedding_request"]) == {
        "input": "abc",
        "pooling_params": {"pooling": "mean", "dimensions": 2, "normalize": False},
    }
    assert asked.sampling == {"truncate_prompt_tokens": 5, "priority": 3}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"input": []}, "input", "a non-empty list of these"),
        ({"input": [""]}, "input", r"input[0] must be a non-empty string"),
        ({"input": [1, "a"]}, "input", r"input[0] must be"),
        ({"input": 3}, "input", "input must be a string"),
        ({}, "input", "input must be a string"),
        ({"input": ["a"] * 5}, "input", "input: at most 4 in one request, not 5"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "encoding_format must be float or base64"),
        ({"input": "a", "temperature": 0}, "temperature", "unknown parameter 'temperature'"),
        ({"input": "a", "stream": True}, "stream", "unknown parameter 'stream'"),
        ({"input": "a", "dimension": 3}, "dimension", "did you mean dimensions?"),
        ({"input": "a", "model": ""}, "model", "you must name a model"),
    ],
)
async def test_what_is_wrong_is_named(engine, body, param, words):
    async with gate(engine, Settings(limits=Limits(embedding_inputs=4))) as gateway:
        answer = await gateway.http.post("/v1/embeddings", json={"model": "demo", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert not engine.asked


async def test_what_the_engine_refuses():
    async with gate(MemoryTransport(fails(InvalidRequest("pooling_params.dimensions must be …")))) as gateway:
        with pytest.raises(openai.BadRequestError, match="- dimensions must be") as caught:
            await client(gateway.url).embeddings.create(model="demo", input=["a", "b"], dimensions=9)
        assert caught.value.param == "dimensions"
    async with gate(MemoryTransport(fails(Unavailable("queue is full", retry_after_ms=10)))) as gateway:
        answer = await gateway.http.post("/v1/embeddings", json={"model": "demo", "input": "a"})
        assert answer.status_code == 503
        answer = await gateway.http.post("/v1/embeddings", json={"model": "nobody", "input": "a"})
        assert answer.status_code == 404


@pytest.mark.parametrize(("allowed", "most"), [(None, 3), (2, 2)])
async def test_few_run_at_once(tmp_path, allowed, most):
    """Of one request; a key that may have fewer in flight waits longer."""
    running, seen = 0, []

    async def slowly(asked):
        nonlocal running
        running += 1
        seen.append(running)
        await asyncio.sleep(0.01)
        running -= 1
        async for chunk in embeds(asked):
            yield chunk

    key, entry = new_key("me")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{**entry, **({"requests_in_flight": allowed} if allowed else {})}]))
    settings = Settings(limits=Limits(embeddings_at_once=3), keys_file=keys)
    async with gate(MemoryTransport(slowly), settings) as gateway:
        answer = await client(gateway.url, key).embeddings.create(model="demo", input=["a"] * 8)
    assert len(answer.data) == 8
    assert max(seen) == most


async def test_tokens_are_counted_and_charged(engine, tmp_path):
    key, entry = new_key("me")
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps([{**entry, "tokens_per_minute": 10}]))
    async with gate(engine, Settings(keys_file=keys)) as gateway:
        asks = client(gateway.url, key).embeddings
        await asks.create(model="demo", input=[5] * 12)
        with pytest.raises(openai.RateLimitError, match="10 tokens per minute"):
            await asks.create(model="demo", input="a")
        metrics = (await gateway.http.get("/metrics", headers={"x-api-key": key})).text
    assert 'prompt_tokens_total{model="demo"} 12.0' in metrics


# --- how far a prompt is ----------------------------------------------------------------------------------------


async def progresses(asked):
    if "return_progress" in asked.request.flags:
        for processed in (128, 300):
            progress = {"total": 300, "cache": 16, "processed": processed, "time_ms": 2.5}
            yield Chunk("", "None", 3, 0, progress=json.dumps(progress))
    yield piece("one ")
    yield piece("two", "stop")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_a_stream_says_how_far_its_prompt_is_if_asked(path):
    own = {} if "chat" in path else {"prompt": "a"}
    async with gate(MemoryTransport(progresses)) as gateway:
        chunks = await gateway.chunks(path, return_progress=True, **own)
        told = [chunk["prompt_progress"] for chunk in chunks if "prompt_progress" in chunk]
        assert [progress["processed"] for progress in told] == [128, 300]
        assert told[0] == {"total": 300, "cache": 16, "processed": 128, "time_ms": 2.5}
        assert all(len(chunk["choices"]) == 1 for chunk in chunks)
        plain = await gateway.chunks(path, **own)
        assert not any("prompt_progress" in chunk for chunk in plain)
        body = {"model": "demo", **(own or {"messages": [{"role": "user", "content": "a"}]})}
        stream = await gateway.http.post(path, json={**body, "stream": True, "return_progress": True})
        assert "one " in stream.text
        refused = await gateway.http.post(path, json={**body, "return_progress": True})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_progress")


async def test_openais_client_reads_such_a_stream():
    async with gate(MemoryTransport(progresses)) as gateway:
        stream = await client(gateway.url).chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "a"}], stream=True, extra_body={"return_progress": True}
        )
        chunks = [chunk async for chunk in stream]
    assert [chunk.prompt_progress["processed"] for chunk in chunks if hasattr(chunk, "prompt_progress")] == [128, 300]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two"
