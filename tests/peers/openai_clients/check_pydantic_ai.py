"""pydantic-ai, with its models of OpenAI's chats and responses."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelHTTPError, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]


KINDS = pytest.mark.parametrize("kind", [OpenAIChatModel, OpenAIResponsesModel])


def at(gateway, model, kind=OpenAIChatModel, retries=0):
    """A client for each: its connections belong to one event loop."""
    client = openai.AsyncOpenAI(base_url=gateway.v1, api_key="none", max_retries=retries)
    return kind(model, provider=OpenAIProvider(openai_client=client))


def agent_of(real, kind=OpenAIChatModel, **settings):
    limits = {"max_tokens": real.max_tokens, "temperature": 0}
    return Agent(at(real.gateway, real.model, kind), model_settings=limits, retries=0, **settings)


@KINDS
def test_an_answer(real, kind):
    result = asyncio.run(agent_of(real, kind).run(real.prompt))
    assert result.output == real.answer
    assert 0 < result.usage.output_tokens <= real.max_tokens


@KINDS
def test_a_stream(real, kind):
    async def text():
        async with agent_of(real, kind).run_stream(real.prompt) as stream:
            return "".join([piece async for piece in stream.stream_text(delta=True)])

    assert asyncio.run(text()) == real.answer


@KINDS
def test_an_unknown_model(real, kind):
    with pytest.raises(ModelHTTPError) as raised:
        asyncio.run(Agent(at(real.gateway, "nope", kind)).run("hello"))
    assert raised.value.status_code == 404


def test_structured_output(real):
    for output in (Weather, NativeOutput(Weather)):
        agent = Agent(at(real.gateway, real.model), model_settings={"max_tokens": 100}, retries=0, output_type=output)
        assert asyncio.run(agent.run(real.prompt)).output.city in ("Rome", "Paris")


def test_a_busy_engine_is_asked_again(scripted, new_words):
    assert asyncio.run(Agent(at(scripted, "busy", retries=1)).run(new_words)).output == "one two three"


def test_an_engine_that_stays_busy(scripted):
    with pytest.raises(ModelHTTPError) as raised:
        asyncio.run(Agent(at(scripted, "full")).run("hello"))
    assert raised.value.status_code == 503


@KINDS
def test_thoughts_and_what_comes_after_them(scripted, kind):
    async def twice():
        agent = Agent(at(scripted, "thinks", kind))
        first = await agent.run("hello")
        again = await agent.run("again", message_history=first.all_messages())
        return first.output, again.output, [part.part_kind for part in first.all_messages()[-1].parts]

    assert asyncio.run(twice()) == ("Rome it is", "Rome it is", ["thinking", "text"])


@KINDS
@pytest.mark.parametrize("stream", [False, True])
def test_tools(scripted, kind, stream):
    agent, cities = Agent(at(scripted, "calls", kind)), []

    @agent.tool_plain
    def weather(city: str) -> int:
        """Of a city."""
        cities.append(city)
        return 21

    async def text():
        if not stream:
            return (await agent.run("hello")).output
        async with agent.run_stream("hello") as result:
            return await result.get_output()

    assert asyncio.run(text()) == "It is 21 degrees."
    assert cities == ["Rome"]
