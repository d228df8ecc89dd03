"""What reaches the server, over either protocol; and what is refused before it is sent."""

from __future__ import annotations

import json

import numpy as np
import pytest

from client_peers import PEERS, Error, Peer, say
from flashserve_client import AsyncClient, Client, InvalidRequest, NotFound
from flashserve_client.connect import parse_url


@pytest.fixture(params=PEERS)
async def peer(request):
    async with PEERS[request.param]() as peer:
        yield peer


ASKED_FOR = {
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_input_tokens": True,
    "return_num_output_tokens": True,
    "return_request_metrics": True,
}


async def test_generate_sends_the_prompt_and_the_parameters_by_name(peer: Peer):
    async with AsyncClient(peer.url) as client:
        await client.generate("héllo\n", max_tokens=5, temperature=0.5, stop=["é"], top_k=None, priority=-2)
    (asked,) = peer.asked
    assert asked.model == "smollm2"
    assert len(asked.request_id) == 16
    assert asked.sampling == {"max_tokens": 5, "temperature": 0.5, "stop": ["é"], "priority": -2}
    del asked.inputs["sampling_parameters"]
    assert asked.inputs == {"text_input": "héllo\n", **ASKED_FOR}


async def test_stream_asks_for_a_stream(peer: Peer):
    async with AsyncClient(peer.url, model="m") as client:
        async for _ in client.stream("hello", request_id="mine"):
            pass
    (asked,) = peer.asked
    assert asked.sampling == {"max_tokens": 256}
    del asked.inputs["sampling_parameters"]
    assert asked.inputs == {"text_input": "hello", "stream": True, **ASKED_FOR}
    assert (asked.model, asked.request_id) == ("m", "mine")


ANY_PLAIN_NAME = "a@b+c%41=d:e,f_g-h.i"


async def test_a_models_name_is_sent_as_it_is(peer: Peer):
    """Triton does not decode paths, so that a quoted name would be another model's."""
    async with AsyncClient(peer.url, model=ANY_PLAIN_NAME) as client:
        await client.generate("hello")
        async for _ in client.stream("hello"):
            pass
        await client.load_model(ANY_PLAIN_NAME)
    assert [asked.model for asked in peer.asked] == [ANY_PLAIN_NAME] * 2
    assert peer.controlled == [f"load {ANY_PLAIN_NAME}"]


@pytest.mark.parametrize("name", ["a b", "a/b", "a?b", "a#b", "模型", "a\r\nb"])
async def test_a_name_that_no_path_can_say_is_refused(name: str):
    async with AsyncClient("http://localhost:1", model="m") as client:
        for call in (client.generate("hello", model=name), client.load_model(name), client.unload_model(name)):
            with pytest.raises(InvalidRequest, match="cannot be sent over HTTP, use grpc://"):
                await call


async def test_token_ids_are_a_sampling_parameter(peer: Peer):
    async with AsyncClient(peer.url) as client:
        await client.generate([1, 2, 3])
        await client.generate(np.array([4, 5]), temperature=np.float32(0.5), stop_token_ids=np.array([7]))
    assert peer.asked[0].sampling == {"prompt_token_ids": [1, 2, 3], "max_tokens": 256}
    assert peer.asked[1].sampling == {
        "prompt_token_ids": [4, 5],
        "temperature": 0.5,
        "stop_token_ids": [7],
        "max_tokens": 256,
    }
    assert "text_input" not in peer.asked[0].inputs


async def test_messages_are_a_chat_request_with_what_the_template_takes(peer: Peer):
    messages = [{"role": "user", "content": "你好"}]
    async with AsyncClient(peer.url) as client:
        await client.generate(messages, max_tokens=3, tools=[{"type": "function"}], add_generation_prompt=True)
    (asked,) = peer.asked
    assert json.loads(asked.inputs["chat_request"]) == {
        "messages": messages,
        "tools": [{"type": "function"}],
        "add_generation_prompt": True,
    }
    assert asked.sampling == {"max_tokens": 3}
    assert "text_input" not in asked.inputs


async def test_the_timeout_is_the_servers_deadline_in_milliseconds(peer: Peer):
    async with AsyncClient(peer.url, timeout_s=7) as client:
        await client.generate("x")
        await client.generate("x", timeout_s=0.0204)
    assert [asked.sampling for asked in peer.asked] == [
        {"timeout_ms": 7000, "max_tokens": 256},
        {"timeout_ms": 21, "max_tokens": 256},
    ]


async def test_headers_go_along(peer: Peer):
    async with AsyncClient(peer.url, headers={"Authorization": "Bearer t"}) as client:
        await client.generate("x")
    assert peer.asked[0].metadata["authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("x", {"stop": object()}, "'stop': cannot be sent as JSON"),
        ("x", {"temperature": float("nan")}, "'temperature': cannot be sent as JSON"),
        ("x", {"stop": "\ud800"}, "lone surrogate"),
        ("a\udc00", {}, "prompt: not valid Unicode: lone surrogate at position 1"),
        ([{"role": "user", "content": "\ud800"}], {}, "messages: not valid Unicode"),
        ([{"role": "user"}, "hello"], {}, "messages: item 1 is 'hello'"),
        ("x", {"tools": []}, "tools: belongs to a prompt that is a list of messages"),
        ("x", {"n": 0}, "n: a positive number of samples is needed, got 0"),
        ("x", {"n": "2"}, "n: a positive number of samples is needed, got '2'"),
        ("x", {"n": True}, "n: a positive number of samples is needed, got True"),
        ("x", {"timeout_s": 0}, "timeout_s: a positive number of seconds"),
        ("x", {"timeout_s": float("inf")}, "timeout_s: a positive number of seconds"),
        ([], {}, "a non-empty list"),
        ([1, True], {}, "item 1 is True, not an int"),
        ([1.5], {}, "item 0 is 1.5, not an int"),
        (b"x", {}, "got bytes"),
        (None, {}, "got NoneType"),
    ],
)
async def test_what_cannot_be_sent_is_refused_by_name(prompt, params, words):
    async with AsyncClient("grpc://127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest) as caught:
            client.stream(prompt, **params)
        assert words in str(caught.value)
        with pytest.raises(InvalidRequest):
            await client.generate(prompt, **params)


async def test_tokenize_and_detokenize(peer: Peer):
    async def tokenizer(asked):
        body = json.loads(asked.inputs["tokenize_request"])
        assert asked.inputs.keys() == {"tokenize_request"}
        answers = {"text": {"token_ids": [1, 2]}, "messages": {"token_ids": [3]}, "token_ids": {"text": "é"}}
        yield {"text_output": json.dumps(answers[next(iter(body))])}

    peer.script = tokenizer
    async with AsyncClient(peer.url) as client:
        assert await client.tokenize("hello") == [1, 2]
        assert await client.tokenize([{"role": "user", "content": "x"}]) == [3]
        assert await client.detokenize([5, 6]) == "é"


async def test_a_tokenizer_error_is_typed(peer: Peer):
    async def refuse(asked):
        yield Error("no [code=NOT_FOUND]")

    peer.script = refuse
    async with AsyncClient(peer.url) as client:
        with pytest.raises(NotFound):
            await client.tokenize("hello")


async def test_models_are_listed_loaded_and_unloaded(peer: Peer):
    async with AsyncClient(peer.url) as client:
        (model,) = await client.models()
        assert (model.name, model.version, model.state) == ("demo", "1", "READY")
        await client.load_model("demo")
        await client.unload_model("demo")
        with pytest.raises(InvalidRequest, match="load failed"):
            await client.load_model("broken")
    assert peer.controlled == ["load demo", "unload demo"]


async def test_a_model_can_be_loaded_from_files_that_no_repository_has(peer: Peer):
    async with AsyncClient(peer.url) as client:
        await client.load_model("new", config={"backend": "flashserve"}, files={"1/model.json": b"{}"})
        assert peer.given == {"config": b'{"backend": "flashserve"}', "file:1/model.json": b"{}"}
        peer.ready_beside.append("new")
        assert [(row.name, row.state) for row in await client.models()] == [("demo", "READY"), ("new", "READY")]
        await client.load_model("demo")
        assert peer.given == {}


@pytest.mark.parametrize(
    ("url", "parsed"),
    [
        ("grpc://host", ("grpc", "host", 8001)),
        ("http://host", ("http", "host", 8000)),
        ("https://host:443/", ("https", "host", 443)),
        ("grpcs://[::1]:9", ("grpcs", "::1", 9)),
    ],
)
def test_urls(url, parsed):
    assert tuple(parse_url(url)) == parsed


@pytest.mark.parametrize(
    "url",
    ["localhost:8000", "ftp://host", "http://", "http://host/v1", "", "grpc://u:p@host", "http://[", "grpc://a:99999"],
)
def test_a_bad_url_is_refused_at_once(url):
    for kind in (AsyncClient, Client):
        with pytest.raises(ValueError, match="server URL"):
            kind(url)


async def test_health_asks_the_engine_through_an_urgent_request(peer: Peer):
    async def one(asked):
        yield say("x", "length")

    peer.script = one
    async with AsyncClient(peer.url) as client:
        health = await client.health()
    assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, True)
    sampling = peer.asked[0].sampling
    assert sampling.pop("timeout_ms") < 5000
    assert sampling == {"prompt_token_ids": [0], "max_tokens": 1, "priority": -1_000_000}


async def test_a_full_queue_is_not_a_dead_engine(peer: Peer):
    async def full(asked):
        yield Error("the queue is full: 9 requests with 99 tokens wait [code=UNAVAILABLE retry_after_ms=900]")

    peer.script = full
    async with AsyncClient(peer.url) as client:
        health = await client.health()
    assert health.engine_ready
    assert "queue is full" in health.detail


async def test_health_tells_a_dead_engine_from_a_missing_model_and_a_dead_server(peer: Peer):
    async def dead(asked):
        yield Error("the engine restarts [code=UNAVAILABLE retry_after_ms=900]")

    peer.script = dead
    async with AsyncClient(peer.url, retries=5) as client:
        health = await client.health()
        assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, False)
        assert health.detail == "the engine restarts"
        assert len(peer.asked) == 1, "a health check does not retry"
        peer.ready = False
        health = await client.health()
        assert (health.server_live, health.model_ready, health.engine_ready) == (True, False, False)
        await peer.stop()
        health = await client.health(timeout_s=2)
        assert (health.server_live, health.model_ready, health.engine_ready) == (False, False, False)
        assert "no server at" in health.detail or "broke" in health.detail
