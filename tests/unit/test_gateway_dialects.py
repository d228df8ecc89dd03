"""The gateway in the languages of others: Anthropic's Messages API through its own package, and TorchWeave's."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest

from flashserve_client import InvalidRequest, Unavailable
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import CHAT, MemoryTransport, endless, fails, gate, piece, says

MESSAGE: dict[str, Any] = {"model": "demo", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]}
TOOL = {"name": "weather", "description": "of a city", "input_schema": {"type": "object", "properties": {}}}
CALL = ["Let me see.\n", '<tool_call>{"name": "wea', 'ther", "arguments": {"city": ', '"Rome"', "}}</tool_call>"]


def client(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0)


async def test_a_whole_message_and_a_streamed_one():
    async with gate() as gateway:
        messages = client(gateway.url).messages
        whole = await messages.create(**MESSAGE, system="be brief", stop_sequences=["END"], extra_body={"top_k": 5})
        assert [block.model_dump(include={"type", "text"}) for block in whole.content] == [
            {"type": "text", "text": "one two three"}
        ]
        assert (whole.stop_reason, whole.usage.input_tokens, whole.usage.output_tokens) == ("end_turn", 3, 3)
        asked = gateway.engine.asked[0]
        assert [message["role"] for message in asked.chat["messages"]] == ["system", "user"]
        assert (asked.sampling["stop"], asked.sampling["max_tokens"], asked.sampling["top_k"]) == (["END"], 20, 5)
        async with messages.stream(**MESSAGE) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_message()
        assert final.content[0].text == "one two three"
        assert final.usage.output_tokens == 3
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


async def test_the_first_event_knows_the_prompts_tokens():
    async with gate() as gateway:
        counted = await client(gateway.url).messages.count_tokens(model="demo", messages=MESSAGE["messages"])
        assert counted.input_tokens == 5  # in memory a token per character
        async for event in await client(gateway.url).messages.create(**MESSAGE, stream=True):
            assert event.type == "message_start" and event.message.usage.input_tokens == 5
            break


async def test_tools_are_called_and_their_results_come_back():
    history = [
        {"role": "user", "content": [{"type": "text", "text": "And in Paris?"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""}, {"type": "text", "text": "I ask."},
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Paris"}}]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "rain"}]},
            {"type": "text", "text": "So?"}]},
    ]  # fmt: skip
    async with gate(MemoryTransport(says(*CALL, *CALL[1:]))) as gateway:
        body = {**MESSAGE, "messages": history, "tools": [TOOL]}
        whole = await client(gateway.url).messages.create(**body)
        async with client(gateway.url).messages.stream(**body) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert [block.type for block in message.content] == ["text", "tool_use", "tool_use"]
            assert message.content[0].text == "Let me see."
            assert message.content[1].input == {"city": "Rome"}
            assert message.stop_reason == "tool_use"
        one = await client(gateway.url).messages.create(
            **body, tool_choice={"type": "auto", "disable_parallel_tool_use": True}
        )
        assert [block.type for block in one.content] == ["text", "tool_use"]
    chat = gateway.engine.asked[0].chat
    assert [message["role"] for message in chat["messages"]] == ["user", "assistant", "tool", "user"]
    assert chat["messages"][1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert chat["messages"][2] == {"role": "tool", "tool_call_id": "toolu_1", "content": "rain"}
    assert chat["tools"][0]["function"]["name"] == "weather"


async def test_reasoning_is_a_block_of_its_own():
    async with gate(MemoryTransport(says("<think>hm</think>", "Yes"))) as gateway:
        async with client(gateway.url).messages.stream(**MESSAGE) as stream:
            message = await stream.get_final_message()
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert message.content[0].thinking == "hm"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [{"type": "web_search_20250305", "name": "x"}]}, "tools[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"temprature": 1}, "temprature"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ],
)
async def test_what_is_wrong_is_said_in_anthropics_shape(body: dict[str, Any], words: str):
    async with gate() as gateway:
        response = await gateway.http.post("/v1/messages", json={**MESSAGE, **body})
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert words in response.json()["error"]["message"]


async def test_a_conversation_that_is_to_be_kept_is_refused_with_the_code_that_clients_know():
    async with gate() as gateway:
        response = await gateway.http.post("/v1/messages", json={**MESSAGE, "thread": {"type": "create"}})
        assert response.status_code == 400
        assert response.json()["error"]["details"] == {"error_code": "thread_unsupported_request"}
        assert not gateway.engine.asked


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_engine_have_anthropics_classes(stream: bool):
    async with gate(MemoryTransport(fails(Unavailable("queue is full", retry_after_ms=10)))) as gateway:
        with pytest.raises(anthropic.APIStatusError) as raised:
            await client(gateway.url).messages.create(**MESSAGE, stream=stream)
        assert raised.value.status_code == 503
        assert raised.value.body["error"]["type"] == "overloaded_error"
        gateway.engine.script = fails(InvalidRequest("temperature must be less"))
        with pytest.raises(anthropic.BadRequestError):
            await client(gateway.url).messages.create(**MESSAGE, stream=stream)


async def test_everything_under_messages_has_anthropics_shape():
    async with gate(settings=Settings(limits=Limits(body_bytes=1000))) as gateway:
        large = {**MESSAGE, "system": "x" * 2000}
        for response, status, kind in (
            (await gateway.http.get("/v1/messages"), 405, "invalid_request_error"),
            (await gateway.http.post("/v1/messages/nothing", json={}), 404, "not_found_error"),
            (await gateway.http.post("/v1/messages", json=large), 413, "request_too_large"),
            (await gateway.http.post("/v1/messages", content=b"{}", headers={"content-encoding": "gzip"}), 415,
             "invalid_request_error"),
            (await gateway.http.get("/v1/messages", headers={"host": "evil.example"}), 403, "permission_error"),
        ):  # fmt: skip
            assert response.status_code == status
            assert response.json()["type"] == "error" and response.json()["error"]["type"] == kind
        assert "type" not in (await gateway.http.get("/v1/messagesx")).json()


async def test_an_empty_answer_has_a_block_in_both_forms():
    async with gate(MemoryTransport(says(""))) as gateway:
        whole = await client(gateway.url).messages.create(**MESSAGE)
        async with client(gateway.url).messages.stream(**MESSAGE) as stream:
            streamed = await stream.get_final_message()
        for message in (whole, streamed):
            assert [(block.type, block.text) for block in message.content] == [("text", "")]


async def test_a_tools_arguments_that_nobody_could_send_back_are_none():
    deep = '<tool_call>{"name": "weather", "arguments": {"a": ' + "[" * 2000 + "]" * 2000 + "}}</tool_call>"
    async with gate(MemoryTransport(says(deep))) as gateway:
        whole = await client(gateway.url).messages.create(**MESSAGE, tools=[TOOL])
        assert whole.content[0].input == {}


# --- TorchWeave --------------------------------------------------------------------------------------------------


async def test_generate_streams_the_first_tokens_time_the_text_and_its_end():
    async with gate(MemoryTransport(says("one\n", "\ntwo"))) as gateway:
        text = (await gateway.http.post("/v1/generate", json={"prompt": "a", "max_new_tokens": 5})).text
        first, *pieces, done, last = text.split("\n\n")
        assert first.startswith("event: ttft\ndata: ") and float(first.split(" ")[-1]) > 0
        assert ["\n".join(line.removeprefix("data: ") for line in event.split("\n")) for event in pieces] == [
            "one\n",
            "\ntwo",
        ]
        assert (done, last) == ('event: done\ndata: {"tokens":2}', "")
        assert gateway.engine.asked[0].sampling["max_tokens"] == 5
        for wrong in ({}, {"prompt": ""}, {"prompt": "a", "max_new_tokens": 0}, {"prompt": "a", "max_tokens": 5},
                      {"prompt": "a", "repetition_penalty": 1.2, "best_of": 2}):  # fmt: skip
            assert (await gateway.http.post("/v1/generate", json=wrong)).status_code == 400
        assert (await gateway.http.get("/model")).json() == {"model_id": "demo", "loaded_models": ["demo"]}


async def test_without_batching_one_runs_at_a_time_and_one_that_leaves_makes_room():
    running = most = 0

    async def counted(asked):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        yield piece("done", "stop")

    async with gate(MemoryTransport(counted)) as gateway:
        ask = {"prompt": "a"}
        answers = await asyncio.gather(*(gateway.http.post("/v1/generate_nobatch", json=ask) for _ in range(5)))
        assert [answer.json()["text"] for answer in answers] == ["done"] * 5
        assert most == 1
        gateway.engine.script = endless
        leaving = asyncio.create_task(gateway.http.post("/v1/generate_nobatch", json=ask))
        while len(gateway.engine.asked) < 6:
            await asyncio.sleep(0.005)
        leaving.cancel()
        assert await gateway.ended(5) == "cancelled"
        gateway.engine.script = says("next")
        assert (await gateway.http.post("/v1/generate_nobatch", json=ask)).json()["text"] == "next"
        assert (await gateway.chat(**CHAT)).status_code == 200
