"""The gateway as OpenAI's own package sees it, and its bytes as they are, in front of an engine in memory."""

from __future__ import annotations

import asyncio

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as CompletionParams

from flashserve import sampling_params
from flashserve_client import ConnectionFailed, DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from flashserve_gateway import abilities, parameters
from gateway_peers import CHAT, MemoryTransport, fails, gate, piece, says


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def test_a_whole_chat_through_openais_client():
    async with gate() as gateway:
        answer = await client(gateway.url).chat.completions.create(**CHAT, temperature=0)
    assert answer.choices[0].message.content == "one two three"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.total_tokens == 6
    assert answer.usage.prompt_tokens_details is not None and answer.usage.prompt_tokens_details.cached_tokens == 2
    assert gateway.engine.asked[0].sampling["temperature"] == 0
    assert not gateway.engine.asked[0].request.stream  # one response costs the engine less than one per token


async def test_the_events_of_a_streamed_chat():
    async with gate() as gateway:
        chunks = await gateway.chunks(stream_options={"include_usage": True})
    assert [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    *pieces, finish, usage = chunks
    assert [piece["choices"][0]["delta"] for piece in pieces] == [
        {"role": "assistant", "content": ""},
        {"content": "one "},
        {"content": "two "},
        {"content": "three"},
    ]
    assert {piece["choices"][0]["finish_reason"] for piece in pieces} == {None}
    assert (finish["choices"][0]["delta"], finish["choices"][0]["finish_reason"]) == ({}, "stop")
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 3
    assert [chunk["usage"] for chunk in (*pieces, finish)] == [None] * 5
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1


async def test_a_stream_without_usage_has_a_choice_in_every_chunk():
    async with gate() as gateway:
        chunks = await gateway.chunks()
    assert all(len(chunk["choices"]) == 1 and "usage" not in chunk for chunk in chunks)


async def test_openais_stream_helper_joins_the_pieces():
    async with gate() as gateway, client(gateway.url).chat.completions.stream(**CHAT) as stream:
        answer = await stream.get_final_completion()
    assert answer.choices[0].message.content == "one two three"


async def test_completions_of_a_text_of_ids_and_of_lists():
    async with gate() as gateway:
        asks = client(gateway.url).completions
        for prompt, texts in (
            ("hello", ["one two three"]),
            ([1, 2], ["one two three"]),
            (["a", "b"], ["one two three"] * 2),
            ([[1], [2], [3]], ["one two three"] * 3),
        ):
            answer = await asks.create(model="demo", prompt=prompt)
            assert [choice.text for choice in answer.choices] == texts
            assert [choice.index for choice in answer.choices] == list(range(len(texts)))
            assert answer.usage is not None and answer.usage.completion_tokens == 3 * len(texts)
        assert gateway.engine.asked[0].sampling["max_tokens"] == 16  # OpenAI's default, here as there
        assert gateway.engine.asked[1].sampling["prompt_token_ids"] == [1, 2]
        echoed = await asks.create(model="demo", prompt=["hello ", [104, 105]], echo=True)
        assert [choice.text for choice in echoed.choices] == ["hello one two three", "hione two three"]


async def test_streamed_completions_of_several_prompts():
    async with gate() as gateway:
        stream = await client(gateway.url).completions.create(
            model="demo", prompt=["a", "b"], stream=True, echo=True, stream_options={"include_usage": True}
        )
        texts, reasons, usage = ["", ""], ["", ""], None
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                reasons[choice.index] += choice.finish_reason or ""
    assert texts == ["aone two three", "bone two three"]
    assert reasons == ["stop", "stop"]
    assert usage is not None and usage.completion_tokens == 6


@pytest.mark.parametrize("prompt", ["hello", [104, 105]])
async def test_what_is_refused_has_its_status_also_where_the_prompt_would_come_first(prompt: object):
    async with gate(MemoryTransport(fails(Unavailable("queue is full", retry_after_ms=10)))) as gateway:
        body = {"model": "demo", "prompt": prompt, "echo": True, "stream": True}
        assert (await gateway.http.post("/v1/completions", json=body)).status_code == 503
        for stream in (True, False):
            unknown = await gateway.http.post("/v1/completions", json={**body, "model": "nope", "stream": stream})
            assert unknown.status_code == 404


@pytest.mark.parametrize("prompt", ["hello", ["hello", "goodbye"]])
async def test_several_answers_to_a_prompt(prompt: str | list[str]):
    async def script(asked):
        yield piece(f"{asked.request.strings['text_input']} {asked.sampling['seed']}", "stop")

    async with gate(MemoryTransport(script)) as gateway:
        asks = client(gateway.url).completions
        answer = await asks.create(model="demo", prompt=prompt, n=3, seed=7)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        assert [choice.text for choice in answer.choices] == [f"{text} {7 + k}" for text in prompts for k in range(3)]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3 * len(prompts), 3 * len(prompts))


async def test_several_answers_to_a_chat():
    async def script(asked):
        yield piece("one ")
        yield piece(str(asked.sampling["seed"]), "stop")

    async with gate(MemoryTransport(script)) as gateway:
        gateway.engine.script = script
        chunks = await gateway.chunks(n=3, seed=7, stream_options={"include_usage": True})
        assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]  # clients number them as they come
        assert all(chunk["choices"][0]["delta"].get("role") for chunk in chunks[:3])
        texts = ["", "", ""]
        for chunk in chunks[3:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["delta"].get("content", "")
        assert texts == ["one 7", "one 8", "one 9"]
        assert chunks[-1]["usage"]["prompt_tokens"] == 3 and chunks[-1]["usage"]["completion_tokens"] == 6
        async with client(gateway.url).chat.completions.stream(**CHAT, n=2, seed=1) as stream:
            final = await stream.get_final_completion()
        assert [choice.message.content for choice in final.choices] == ["one 1", "one 2"]
    async with gate() as gateway:
        whole = await client(gateway.url).chat.completions.create(**CHAT, n=2)
        assert [choice.message.content for choice in whole.choices] == ["one two three"] * 2


async def test_the_developer_is_the_system_and_a_limit_has_two_names():
    async with gate() as gateway:
        messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hello"}]
        await gateway.chat(messages=messages, max_completion_tokens=7)
        await gateway.chat()
    first, second = gateway.engine.asked
    assert [message["role"] for message in first.chat["messages"]] == ["system", "user"]
    assert first.sampling["max_tokens"] == 7
    assert second.sampling["max_tokens"] == parameters.INT32_MAX  # until the context is full


async def test_text_that_is_no_ascii_and_line_breaks_arrive_as_they_are():
    text = 'é你好😀 "quoted"\n\n\u2028\x00 data: [DONE]\n\n'
    async with gate(MemoryTransport(says(*text))) as gateway:
        stream = await client(gateway.url).chat.completions.create(**CHAT, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == text


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "own"), [(ChatParams, parameters.CHAT), (CompletionParams, parameters.COMPLETION)])
def test_every_field_of_openais_api_has_its_place(params: type, own: frozenset[str]):
    places = [own, parameters.ENGINE, parameters.IGNORED, abilities.FIELDS]
    for name in params.__annotations__:
        assert sum(name in place for place in places) == 1, name


def test_every_sampling_parameter_of_the_engine_has_its_place():
    """The gateway's names are a second list, since it never imports the backend."""
    places = parameters.ENGINE | parameters.CHAT | parameters.COMPLETION | abilities.FIELDS
    assert [known.name for known in sampling_params.TABLE if not known.of_request and known.name not in places] == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_logprobs", 1),
        ("guided_json", {"type": "object"}), ("audio", {"voice": "x"}),
        ("modalities", ["text", "audio"]), ("functions", [{"name": "f"}]), ("reasoning_effort", "high"),
    ],
)  # fmt: skip
async def test_what_the_engine_lacks_is_refused_by_name(field: str, value: object):
    async with gate() as gateway:
        response = await gateway.chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert response.json()["error"]["code"] == "unsupported_parameter"
    assert not gateway.engine.asked


async def test_penalties_biases_and_bans_go_to_the_engine_as_they_are():
    wishes = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.1, "logit_bias": {"5": 3},
              "bad_words": ["no"], "dry_multiplier": 0.8, "xtc_probability": 0.5}  # fmt: skip
    async with gate() as gateway:
        assert (await gateway.chat(**wishes)).status_code == 200
        sampling = gateway.engine.asked[0].sampling
    assert {name: sampling.get(name) for name in wishes} == wishes


async def test_what_means_nothing_special_is_taken():
    neutral = {"n": 1, "logprobs": False, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {},
               "response_format": {"type": "text"}, "tool_choice": "none", "user": "me", "store": False,
               "metadata": {}, "stop": None, "seed": None, "tools": None, "stream_options": None,
               "top_logprobs": 0}  # fmt: skip
    async with gate() as gateway:
        assert (await gateway.chat(**neutral)).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temprature": 1}, "temprature"),
        ({"model": None}, "model"),
        ({"model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"stream": "yes"}, "stream"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": True}, "max_completion_tokens"),
        ({"max_completion_tokens": 5, "max_tokens": "many"}, "max_tokens"),
        ({"priority": "high"}, "priority"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": "2"}, "n"),
        ({"priority": ""}, "priority"),
        ({"priority": False}, "priority"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"obfuscate": True}}, "stream_options.obfuscate"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ],
)
async def test_a_wrong_field_is_named(body: dict[str, object], param: str):
    async with gate() as gateway:
        response = await gateway.chat(**body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert not gateway.engine.asked


@pytest.mark.parametrize("prompt", [None, [], [[]], [1, "a"], [1.5], {"a": 1}, ["a", []], ["a"] * 65])
async def test_a_wrong_prompt_is_named(prompt: object):
    async with gate() as gateway:
        response = await gateway.http.post("/v1/completions", json={"model": "demo", "prompt": prompt})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (InvalidRequest("temperature must be a number in [0, 1000], not 'hot'"), 400, {"param": "temperature"}),
        (InvalidRequest("chat_request.messages[0].content[1] is of type 'image_url'; only text is supported"), 400,
         {"param": "messages[0].content[1]"}),
        (InvalidRequest("prompt has 9 tokens, the model's context takes at most 8"), 400,
         {"code": "context_length_exceeded", "param": "prompt"}),
        (Unavailable("queue is full: 512 requests wait", retry_after_ms=850), 503, {"code": "overloaded"}),
        (ConnectionFailed("no server at 10.0.0.1:8001"), 503, {"message": "the engine cannot be reached"}),
        (DeadlineExceeded("too late"), 408, {"code": "deadline"}),
        (InternalError("CUDA error at /home/me/x.py"), 500, {"code": "internal_error"}),
        (ZeroDivisionError("secret"), 500, {"code": "internal_error"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_of_the_engine_has_its_status(error: Exception, status: int, expected: dict, stream: bool):
    async with gate(MemoryTransport(fails(error))) as gateway:
        response = await gateway.chat(stream=stream)
    assert response.status_code == status
    body = response.json()["error"]
    assert {key: body[key] for key in expected} == expected
    assert "secret" not in response.text and "/home" not in response.text and "10.0.0.1" not in response.text
    assert response.headers["x-request-id"]
    if status == 503:
        assert float(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) in (850, 1000)
    if status == 500:
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-request-id"] in body["message"]


async def test_openais_client_raises_its_own_errors():
    async with gate() as gateway:
        asks = client(gateway.url).chat.completions
        with pytest.raises(openai.NotFoundError) as raised:
            await asks.create(model="nope", messages=CHAT["messages"])
        assert raised.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError):
            await asks.create(**CHAT, top_logprobs=3)
        gateway.engine.script = fails(Unavailable("queue is full", retry_after_ms=10))
        with pytest.raises(openai.InternalServerError):
            await asks.create(**CHAT)


async def test_openais_client_comes_again_when_it_was_told_to():
    async with gate(MemoryTransport(fails(Unavailable("queue is full", retry_after_ms=10)))) as gateway:
        retrying = client(gateway.url).with_options(max_retries=2).chat.completions
        task = asyncio.create_task(retrying.create(**CHAT))
        while not gateway.engine.asked:
            await asyncio.sleep(0.001)
        gateway.engine.script = says("at last")
        assert (await task).choices[0].message.content == "at last"
        assert "flashserve_gateway:client_retries_total 1.0" in (await gateway.http.get("/metrics")).text


async def test_a_stream_that_breaks_says_so_after_its_first_byte():
    async with gate(MemoryTransport(fails(InternalError("bug"), "one "))) as gateway:
        stream = await client(gateway.url).chat.completions.create(**CHAT, stream=True)
        with pytest.raises(openai.APIError) as raised:
            async for chunk in stream:
                assert chunk.choices[0].delta.content in ("", "one ")
        assert raised.value.code == "internal_error"
        text = (await gateway.chat(stream=True)).text
    assert "[DONE]" not in text


async def test_one_prompt_that_fails_ends_the_others():
    async def script(asked):
        if asked.request.strings["text_input"] == "bad":
            raise Unavailable("queue is full", retry_after_ms=10)
        while True:
            await asyncio.sleep(0.005)
            yield piece("x")

    for stream in (False, True):
        async with gate(MemoryTransport(script)) as gateway:
            body = {"model": "demo", "prompt": ["good", "bad"], "stream": stream}
            response = await gateway.http.post("/v1/completions", json=body)
            assert response.status_code == 503 or "overloaded" in response.text
            assert await gateway.ended(0) == "cancelled"


# --- the other endpoints -----------------------------------------------------------------------------------------


async def test_models_are_listed_and_found_also_with_slashes():
    async with gate(MemoryTransport(names=("demo", "org/model"))) as gateway:
        found = client(gateway.url).models
        assert [model.id for model in (await found.list()).data] == ["demo", "org/model"]
        assert (await found.retrieve("org/model")).owned_by == "flashserve"
        with pytest.raises(openai.NotFoundError):
            await found.retrieve("other")


async def test_tokens_of_a_text_and_back():
    async with gate() as gateway:
        answer = (await gateway.http.post("/tokenize", json={"model": "demo", "prompt": "hi"})).json()
        assert answer == {"count": 2, "tokens": [104, 105]}
        of_messages = {"model": "demo", "messages": CHAT["messages"]}
        assert (await gateway.http.post("/tokenize", json=of_messages)).json()["count"] == 5
        back = await gateway.http.post("/detokenize", json={"model": "demo", "tokens": [104, 105]})
        assert back.json() == {"prompt": "hi"}
        empty = await gateway.http.post("/tokenize", json={"model": "demo", "prompt": ""})
        assert empty.json() == {"count": 0, "tokens": []}
        for wrong in ({}, {"prompt": None}, {"prompt": "a", **CHAT}, {"prompt": 5}, {"messages": "a"}):
            wrong = {"model": "demo", **wrong}
            assert (await gateway.http.post("/tokenize", json=wrong)).status_code == 400


async def test_operators_learn_what_works():
    async with gate() as gateway:
        for path in ("/live", "/ready", "/health", "/version", "/metrics", "/docs", "/openapi.json"):
            assert (await gateway.http.get(path)).status_code == 200, path
        await gateway.chat()
        text = (await gateway.http.get("/metrics")).text
        assert 'requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
        assert 'generation_tokens_total{model="demo"}' in text


async def test_whatever_reads_a_body_describes_the_errors_of_reading_one():
    async with gate() as gateway:
        described = (await gateway.http.get("/openapi.json")).json()["paths"]
        reads_body = [path for path, operations in described.items() if "requestBody" in operations.get("post", {})]
        assert len(reads_body) >= 10
        for path in reads_body:
            statuses = {int(status) for status in described[path]["post"]["responses"]}
            assert statuses >= {400, 401, 408, 413, 415, 503}, path
            answer = await gateway.http.post(path, content=b"{}", headers={"content-type": "text/plain"})
            assert answer.status_code == 415, path


async def test_a_gateway_without_its_server_is_live_and_not_ready():
    async with gate(MemoryTransport(index_error=ConnectionFailed("refused by 10.0.0.1"))) as gateway:
        assert (await gateway.http.get("/live")).status_code == 200
        ready = await gateway.http.get("/ready")
        assert ready.status_code == 503 and "10.0.0.1" not in ready.text
        response = await gateway.chat()
        assert response.status_code == 503 and response.headers["retry-after"]


async def test_an_engine_that_fails_is_not_ready_though_triton_says_so():
    async with gate(MemoryTransport(fails(Unavailable("the engine is starting", retry_after_ms=500)))) as gateway:
        response = await gateway.http.get("/ready")
    assert response.status_code == 503
    assert "starting" in response.json()["detail"]["demo"]


async def test_unknown_paths_and_methods_have_openais_shape():
    async with gate() as gateway:
        for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
            response = await gateway.http.request(method, path)
            assert response.status_code == status
            assert response.json()["error"]["type"] in ("not_found_error", "invalid_request_error")
