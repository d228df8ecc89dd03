"""litellm, by its routes to OpenAI's chats and completions, and to Anthropic's messages."""

from __future__ import annotations

import asyncio

import litellm
import pytest

SAYS = [{"role": "user", "content": "hello"}]


def at(gateway, model, **settings):
    return {"model": f"openai/{model}", "api_base": gateway.v1, "api_key": "none", "max_retries": 0, **settings}


@pytest.fixture
def ask(real):
    return at(real.gateway, real.model, messages=real.messages, max_tokens=real.max_tokens, temperature=0)


def test_an_answer(real, ask):
    answer = litellm.completion(**ask)
    assert answer.choices[0].message.content == real.answer
    assert answer.usage.completion_tokens <= real.max_tokens


def test_a_stream(real, ask):
    chunks = list(litellm.completion(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == real.answer
    assert litellm.stream_chunk_builder(chunks).usage.prompt_tokens > 0


def test_a_stream_of_the_asynchronous_client(real, ask):
    async def text():
        return "".join([c.choices[0].delta.content or "" async for c in await litellm.acompletion(**ask, stream=True)])

    assert asyncio.run(text()) == real.answer


def test_a_text_completion(real):
    settings = at(real.gateway, real.model, max_tokens=8, temperature=0)
    settings["model"] = f"text-completion-openai/{real.model}"
    whole = litellm.text_completion(**settings, prompt="The sky is").choices[0].text
    streamed = litellm.text_completion(**settings, prompt="The sky is", stream=True)
    assert whole and "".join(chunk.choices[0].text or "" for chunk in streamed) == whole


def test_the_route_to_anthropics_messages(real, ask):
    ask |= {"model": f"anthropic/{real.model}", "api_base": real.gateway.url}
    assert litellm.completion(**ask).choices[0].message.content == real.answer
    assert "".join(c.choices[0].delta.content or "" for c in litellm.completion(**ask, stream=True)) == real.answer


def test_an_unknown_model(ask):
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**ask | {"model": "openai/nope"})


def test_an_answer_keeps_to_its_schema(ask, weather_schema):
    schema = {"type": "json_schema", "json_schema": {"name": "weather", "schema": weather_schema, "strict": True}}
    answer = litellm.completion(**ask | {"max_tokens": 60}, response_format=schema)
    assert answer.choices[0].message.content.startswith("{")


def test_a_forced_tool_is_called(ask, weather_tool):
    answer = litellm.completion(**ask | {"max_tokens": 60}, tools=[weather_tool], tool_choice="required")
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


def test_embeddings(real):
    ask = {"model": f"openai/{real.model}", "api_base": real.gateway.v1, "api_key": "none"}
    answer = litellm.embedding(**ask, input=["hello", "a red fox"])
    for item in answer.data:
        assert sum(value * value for value in item["embedding"]) == pytest.approx(1, abs=1e-3)
    assert answer.usage.prompt_tokens > 2


def test_a_busy_engine_is_asked_again(scripted, new_words):
    ask = at(scripted, "busy", messages=[{"role": "user", "content": new_words}]) | {"max_retries": 1}
    assert litellm.completion(**ask).choices[0].message.content == "one two three"


def test_an_engine_that_stays_busy(scripted):
    with pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError), match="queue is full"):
        litellm.completion(**at(scripted, "full", messages=SAYS))


def test_anthropics_messages_by_way_of_responses(scripted):
    """litellm then always asks for encrypted reasoning."""
    ask = {"model": "openai/thinks", "api_base": scripted.v1, "api_key": "none", "max_tokens": 20, "messages": SAYS}
    answer = asyncio.run(litellm.anthropic.messages.acreate(**ask))
    assert answer["content"][-1]["text"] == "Rome it is"


def test_the_responses_api(scripted):
    ask = {"model": "openai/thinks", "api_base": scripted.v1, "api_key": "none", "input": "hello"}
    assert litellm.responses(**ask).output[-1].content[0].text == "Rome it is"
    events = list(litellm.responses(**ask, stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Rome it is"


def test_thoughts_whole_and_streamed(scripted):
    ask = at(scripted, "thinks", messages=SAYS)
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**ask, stream=True)))
    for answer in (litellm.completion(**ask), streamed):
        message = answer.choices[0].message
        assert (message.reasoning_content.strip(), message.content) == ("hm so", "Rome it is")


def test_tools_whole_and_streamed(scripted, weather_tool):
    ask = at(scripted, "calls", messages=SAYS, tools=[weather_tool])
    streamed = litellm.stream_chunk_builder(list(litellm.completion(**ask, stream=True)))
    for answer in (litellm.completion(**ask), streamed):
        [call] = answer.choices[0].message.tool_calls
        assert (call.function.name, call.function.arguments) == ("weather", '{"city": "Rome"}')
        assert answer.choices[0].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": call.id, "content": "21"}
        history = [*SAYS, answer.choices[0].message, result]
        assert litellm.completion(**ask | {"messages": history}).choices[0].message.content == "It is 21 degrees."
