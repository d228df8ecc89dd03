"""Anthropic's own package."""

from __future__ import annotations

import asyncio

import anthropic
import pytest

SAYS = [{"role": "user", "content": "hello"}]


def at(gateway, retries=0, kind=anthropic.Anthropic):
    return kind(base_url=gateway.url, api_key="none", max_retries=retries).messages


@pytest.fixture
def ask(real):
    greedy = {"extra_body": {"temperature": 0}}
    return {"model": real.model, "messages": real.messages, "max_tokens": real.max_tokens, **greedy}


def test_an_answer(real, ask):
    answer = at(real.gateway).create(**ask)
    assert [block.text for block in answer.content] == [real.answer]
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens <= real.max_tokens
    assert answer.stop_reason in ("end_turn", "max_tokens")


def test_a_stream(real, ask):
    whole = at(real.gateway).create(**ask)
    with at(real.gateway).stream(**ask) as stream:
        assert "".join(stream.text_stream) == real.answer
        final = stream.get_final_message()
    assert final.usage.input_tokens == whole.usage.input_tokens
    assert final.stop_reason == whole.stop_reason


def test_a_stream_of_the_asynchronous_client(real, ask):
    async def text():
        async with at(real.gateway, kind=anthropic.AsyncAnthropic).stream(**ask) as stream:
            return await stream.get_final_text()

    assert asyncio.run(text()) == real.answer


def test_tokens_are_counted_as_they_are_charged(real, ask):
    counted = at(real.gateway).count_tokens(model=real.model, messages=real.messages)
    assert counted.input_tokens == at(real.gateway).create(**ask).usage.input_tokens


def test_an_unknown_model(real, ask):
    with pytest.raises(anthropic.NotFoundError):
        at(real.gateway).create(**ask | {"model": "nope"})
    with pytest.raises(anthropic.NotFoundError), at(real.gateway).stream(**ask | {"model": "nope"}):
        pass


def test_a_tool_that_must_be_called(real, ask, weather_schema):
    tool = {"name": "weather", "input_schema": weather_schema}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        answer = at(real.gateway).create(**ask | {"max_tokens": 60}, tools=[tool], tool_choice=choice)
        assert answer.content[0].type == "tool_use" and answer.content[0].name == "weather"


def test_what_the_engine_lacks_is_refused_by_name(real, ask, weather_schema):
    with pytest.raises(anthropic.BadRequestError, match="output_config"):
        at(real.gateway).create(**ask, output_config={"format": {"type": "json_schema", "schema": weather_schema}})


def test_a_busy_engine_is_asked_again(scripted, new_words):
    says = [{"role": "user", "content": new_words}]
    answer = at(scripted, retries=1).create(model="busy", max_tokens=20, messages=says)
    assert answer.content[0].text == "one two three"


def test_an_engine_that_stays_busy(scripted):
    with pytest.raises(anthropic.InternalServerError, match="queue is full") as raised:
        at(scripted).create(model="full", max_tokens=20, messages=SAYS)
    assert raised.value.status_code in (503, 529)


def test_thoughts_whole_and_streamed(scripted):
    ask = {"model": "thinks", "max_tokens": 50, "messages": SAYS}
    with at(scripted).stream(**ask) as stream:
        streamed = stream.get_final_message()
    for answer in (at(scripted).create(**ask), streamed):
        thought, text = answer.content
        assert (thought.thinking.strip(), text.text) == ("hm so", "Rome it is")


@pytest.mark.parametrize("stream", [False, True])
def test_the_tool_runner(scripted, stream):
    """It asks the server to keep the conversation, and must learn that it does not."""
    cities = []

    @anthropic.beta_tool
    def weather(city: str) -> str:
        """Of a city."""
        cities.append(city)
        return "21"

    client = anthropic.Anthropic(base_url=scripted.url, api_key="none", max_retries=0)
    runner = client.beta.messages.tool_runner(
        model="calls", max_tokens=50, tools=[weather], messages=SAYS, stream=stream
    )
    assert runner.until_done().content[0].text == "It is 21 degrees."
    assert cities == ["Rome"]


def test_tools_whole_and_streamed(scripted, weather_schema):
    tool = {"name": "weather", "input_schema": weather_schema}
    ask = {"model": "calls", "max_tokens": 50, "messages": SAYS, "tools": [tool]}
    with at(scripted).stream(**ask) as stream:
        streamed = stream.get_final_message()
    for answer in (at(scripted).create(**ask), streamed):
        call = answer.content[-1]
        assert (answer.stop_reason, call.name, call.input) == ("tool_use", "weather", {"city": "Rome"})
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "21"}
        history = [
            *SAYS,
            {"role": "assistant", "content": answer.content},
            {"role": "user", "content": [result]},
        ]
        assert at(scripted).create(**ask | {"messages": history}).content[0].text == "It is 21 degrees."
