"""The form that an answer must have: OpenAI's and Anthropic's fields, as the engine gets them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from gateway_peers import MemoryTransport, gate, says

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


async def asked_with(path: str, **body: Any) -> dict[str, Any]:
    """The sampling parameters of an accepted request."""
    async with gate(MemoryTransport(says(CALL))) as gateway:
        response = await gateway.http.post(path, json={"model": "demo", **body})
        assert response.status_code == 200, response.text
        return gateway.engine.asked[0].sampling


async def chat_with(**body: Any) -> dict[str, Any]:
    return await asked_with("/v1/chat/completions", messages=[{"role": "user", "content": "a"}], **body)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (FORMAT, {"json": SCHEMA}),
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "text"}, None),
        (None, None),
    ],
)
async def test_a_format_of_chat_and_completions(given, form):
    assert (await chat_with(response_format=given)).get("structured_outputs") == form
    asked = await asked_with("/v1/completions", prompt="a", response_format=given)
    assert asked.get("structured_outputs") == form


async def test_a_format_is_closed_if_that_is_asked_for():
    asked = await chat_with(response_format=FORMAT, close_json=True)
    assert asked["structured_outputs"] == {"json": SCHEMA, "close_json": True} and "close_json" not in asked
    asked = await asked_with("/v1/completions", prompt="a", response_format={"type": "json_object"}, close_json=True)
    assert asked["structured_outputs"] == {"json_object": True, "close_json": True}


async def test_vllms_fields_go_to_the_engine_as_they_are():
    form = {"regex": "[0-9]+", "whitespace_pattern": None}
    sampling = await chat_with(structured_outputs=form)
    assert sampling["structured_outputs"] == form
    assert (await chat_with(allowed_token_ids=[5, 6]))["allowed_token_ids"] == [5, 6]


async def test_a_format_of_responses_is_told_in_the_answer():
    text = {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}}
    async with gate(MemoryTransport(says('{"city": "Rome"}'))) as gateway:
        response = await gateway.http.post("/v1/responses", json={"model": "demo", "input": "a", "text": text})
        assert response.json()["text"] == text
        assert gateway.engine.asked[0].sampling["structured_outputs"] == {"json": SCHEMA}


async def test_openais_client_parses_an_answer():
    class Place(BaseModel):
        city: str

    async with gate(MemoryTransport(says('{"city": ', '"Rome"}'))) as gateway:
        client = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none")
        messages: Any = [{"role": "user", "content": "a"}]
        answer = await client.chat.completions.parse(model="demo", messages=messages, response_format=Place)
        assert answer.choices[0].message.parsed == Place(city="Rome")
        response = await client.responses.parse(model="demo", input="a", text_format=Place)
        assert response.output_parsed == Place(city="Rome")
        for asked in gateway.engine.asked:
            assert asked.sampling["structured_outputs"]["json"]["properties"]["city"]["type"] == "string"


async def test_a_form_begins_with_the_first_token_also_behind_an_opened_thought():
    template = "<|user|>%s<|assistant|><think>\n"
    async with gate(MemoryTransport(says('{"city": "Rome"}'), template=template)) as gateway:
        message = (await gateway.chat(response_format=FORMAT)).json()["choices"][0]["message"]
        assert message["content"] == '{"city": "Rome"}'


@pytest.mark.parametrize(
    ("choice", "reason"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "weather"}}, "stop")],
)
async def test_a_tool_that_must_be_called(choice, reason):
    async with gate(MemoryTransport(says(CALL))) as gateway:
        body = {"tools": [TOOL, OTHER], "tool_choice": choice}
        answer = (await gateway.chat(**body)).json()["choices"][0]
        assert answer["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
        assert answer["finish_reason"] == reason
        assert (await gateway.chunks(**body))[-1]["choices"][0]["finish_reason"] == reason
        grammar = gateway.engine.asked[0].sampling["structured_outputs"]["grammar"]
    assert json.dumps(json.dumps("weather")) in grammar
    assert (json.dumps(json.dumps("clock")) in grammar) == (choice == "required")
    assert len(gateway.engine.asked[0].chat["tools"]) == 2


async def test_a_tool_that_must_be_called_of_the_other_dialects():
    tools = [{"type": "function", "name": "weather", "parameters": SCHEMA}]
    for choice in ("required", {"type": "function", "name": "weather"}):
        sampling = await asked_with("/v1/responses", input="a", tools=tools, tool_choice=choice)
        assert "weather" in sampling["structured_outputs"]["grammar"]
    tool = {"name": "weather", "input_schema": SCHEMA}
    message = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 9, "tools": [tool]}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        sampling = await asked_with("/v1/messages", **message, tool_choice=choice)
        assert "weather" in sampling["structured_outputs"]["grammar"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": FORMAT, "structured_outputs": {"regex": "a"}}, "response_format"),
        ({"response_format": FORMAT, "tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"close_json": True}, "close_json"),
        ({"tools": [TOOL], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "custom"}}, "tool_choice"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}], "tool_choice": "required"},
            "tools[0].function.parameters",
        ),
    ],
)
async def test_what_is_wrong_is_named(body: dict[str, Any], param: str):
    async with gate() as gateway:
        response = await gateway.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not gateway.engine.asked
