"""The Responses API through OpenAI's own package, which checks the order and the identity of what it is sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from flashserve_client import InternalError
from flashserve_gateway import responses
from flashserve_gateway.errors import ApiError
from flashserve_gateway.keys import new_key
from flashserve_gateway.responses import ResponseStore
from flashserve_gateway.settings import Settings
from flashserve_gateway.store.memory import MemoryShelf
from gateway_peers import MemoryTransport, fails, gate, says

TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": True}
CALL = ["Let me see.", '<tool_call>{"name": "wea', 'ther", "arguments": {"city": ', '"Rome"', "}}</tool_call>"]


def client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_every_field_of_openais_api_has_its_place():
    places = [responses.OWN, responses.SAMPLING, responses.IGNORED, set(responses.NEUTRAL)]
    for name in ResponseCreateParamsBase.__annotations__:
        assert sum(name in place for place in places) >= 1, name


async def test_a_whole_response_and_a_streamed_one():
    async with gate() as gateway:
        asks = client(gateway.url).responses
        whole = await asks.create(model="demo", input="hello", instructions="be brief", max_output_tokens=9)
        assert whole.output_text == "one two three"
        assert whole.status == "completed" and whole.usage is not None and whole.usage.total_tokens == 6
        asked = gateway.engine.asked[0]
        assert [message["role"] for message in asked.chat["messages"]] == ["system", "user"]
        assert asked.sampling["max_tokens"] == 9
        async with asks.stream(model="demo", input="hello") as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        assert final.output_text == "one two three"
        assert [event.sequence_number for event in events if hasattr(event, "sequence_number")] == list(
            range(len(events))
        )
        assert [event.type for event in events][:4] == [
            "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        ]  # fmt: skip
        assert events[-1].type == "response.completed"
        Response.model_validate(
            json.loads(events[-1].response.model_dump_json(exclude={"output": {"__all__": {"parsed"}}}))
        )


async def test_calls_reasoning_and_their_items():
    async with gate(MemoryTransport(says("<think>hm</think>", *CALL, *CALL[1:]))) as gateway:
        asks = client(gateway.url).responses
        whole = await asks.create(model="demo", input="hello", tools=[TOOL])
        async with asks.stream(model="demo", input="hello", tools=[TOOL]) as stream:
            streamed = await stream.get_final_response()
        for response in (whole, streamed):
            assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
            call = response.output[2]
            assert (call.name, call.arguments) == ("weather", '{"city": "Rome"}')
        one = await asks.create(model="demo", input="hello", tools=[TOOL], parallel_tool_calls=False)
        assert [item.type for item in one.output] == ["reasoning", "message", "function_call"]


async def test_a_conversation_goes_on_from_a_response_or_from_its_items():
    async with gate(MemoryTransport(says(*CALL))) as gateway:
        asks = client(gateway.url).responses
        first = await asks.create(model="demo", input="And in Rome?", instructions="once", tools=[TOOL])
        call = first.output[1]
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        await asks.create(model="demo", previous_response_id=first.id, input=[result])
        items = [item.model_dump(exclude_none=True) for item in first.output]
        await asks.create(model="demo", input=[{"role": "user", "content": "And in Rome?"}, *items, result])
        for asked in gateway.engine.asked[1:]:
            messages = asked.chat["messages"]
            assert [message["role"] for message in messages] == ["user", "assistant", "tool"]
            assert messages[1]["content"] == "Let me see."
            assert messages[1]["tool_calls"][0]["function"]["name"] == "weather"
            assert messages[2]["tool_call_id"] == messages[1]["tool_calls"][0]["id"] == call.call_id
        assert (await asks.retrieve(first.id)).id == first.id
        await asks.delete(first.id)
        for lost in (first.id, "resp_none"):
            with pytest.raises(openai.NotFoundError):
                await asks.create(model="demo", previous_response_id=lost, input="x")
        unkept = await asks.create(model="demo", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            await asks.retrieve(unkept.id)


async def test_a_response_belongs_to_its_key(tmp_path: Path):
    keys = [new_key(name) for name in ("alice", "bob")]
    (tmp_path / "keys.json").write_text(json.dumps([entry for _, entry in keys]))
    async with gate(settings=Settings(keys_file=tmp_path / "keys.json")) as gateway:
        alice, bob = (client(gateway.url).with_options(api_key=key).responses for key, _ in keys)
        made = await alice.create(model="demo", input="hello")
        assert (await alice.retrieve(made.id)).id == made.id
        with pytest.raises(openai.NotFoundError):
            await bob.retrieve(made.id)
        with pytest.raises(openai.NotFoundError):
            await bob.create(model="demo", input="x", previous_response_id=made.id)


async def test_what_is_remembered_is_bounded_and_the_key_with_the_most_loses():
    store = ResponseStore(MemoryShelf(3600, 1500))
    await store.keep("alice", [{"role": "user", "content": "x"}], {"id": "resp_alice"})
    for number in range(50):
        await store.keep("bob", [{"role": "user", "content": "x" * 100}], {"id": f"resp_{number}"})
    assert (await store.find("alice", "resp_alice")).response["id"] == "resp_alice"
    assert (await store.find("bob", "resp_49")).messages[0]["content"] == "x" * 100
    with pytest.raises(ApiError):
        await store.find("bob", "resp_30")
    huge = [{"role": "user", "content": "x" * 2000}]
    assert not await store.keep("bob", huge, {"id": "huge"})  # more than all of it
    with pytest.raises(ApiError):
        await store.find("bob", "huge")
    assert await store.find("alice", "resp_alice")


async def test_what_is_remembered_is_no_object_of_the_request():
    """Empty lists, say, take 25 times their JSON: what counts as 64 MiB must not be more than a gigabyte."""
    store, messages = ResponseStore(MemoryShelf(3600, 1500)), [{"role": "user", "content": "x"}]
    await store.keep("alice", messages, {"id": "resp"})
    messages[0]["content"] = "changed"
    assert (await store.find("alice", "resp")).messages == [{"role": "user", "content": "x"}]


async def test_the_options_of_a_stream_are_checked():
    async with gate() as gateway:
        for body in ({"stream_options": {"include_obfuscation": False}},
                     {"stream": True, "stream_options": {"x": 1}}, {"stream": True, "stream_options": 5}):  # fmt: skip
            response = await gateway.http.post("/v1/responses", json={"model": "demo", "input": "a", **body})
            assert response.status_code == 400
            assert response.json()["error"]["param"].startswith("stream_options")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"), ({"input": [5]}, "input[0]"), ({"temprature": 1}, "temprature"),
        ({"input": [{"type": "computer_call"}]}, "input[0]"), ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"), ({"tool_choice": "required"}, "tool_choice"),
        ({"text": {"format": {"type": "xml"}}}, "text.format"), ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_named(body: dict[str, Any], param: str):
    async with gate() as gateway:
        response = await gateway.http.post("/v1/responses", json={"model": "demo", "input": "hello", **body})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


async def test_encrypted_reasoning_may_be_asked_for_and_other_additions_may_not():
    async with gate() as gateway:
        for include, status in (["reasoning.encrypted_content"], 200), (["message.output_text.logprobs"], 400):
            body = {"model": "demo", "input": "hello", "include": include}
            assert (await gateway.http.post("/v1/responses", json=body)).status_code == status


async def test_one_that_was_cut_off_is_incomplete_and_one_that_fails_says_so():
    async with gate(MemoryTransport(says("one ", "two", finish="length"))) as gateway:
        response = await client(gateway.url).responses.create(model="demo", input="hello")
        assert response.status == "incomplete"
        assert response.incomplete_details is not None and response.incomplete_details.reason == "max_output_tokens"
        gateway.engine.script = fails(InternalError("bug"), "one ")
        stream = await client(gateway.url).responses.create(model="demo", input="hello", stream=True)
        last = [event async for event in stream][-1]
        assert last.type == "error" and last.code == "internal_error"
