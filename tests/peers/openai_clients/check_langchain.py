"""langchain-openai."""

from __future__ import annotations

import asyncio
from typing import Literal

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel


class Weather(BaseModel):
    city: Literal["Rome", "Paris"]


@tool
def weather(city: str) -> str:
    """Of a city."""
    return "21"


def at(gateway, model, **settings):
    return ChatOpenAI(base_url=gateway.v1, api_key="none", model=model, **{"max_retries": 0, **settings})


@pytest.fixture
def chat(real):
    return at(real.gateway, real.model, max_tokens=real.max_tokens, temperature=0)


def test_an_answer(real, chat):
    answer = chat.invoke(real.prompt)
    assert answer.content == real.answer
    assert answer.usage_metadata["output_tokens"] <= real.max_tokens


def test_a_stream(real, chat):
    chunks = list(chat.stream(real.prompt, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == real.answer and len(chunks) > 2
    assert sum(chunk.usage_metadata["input_tokens"] for chunk in chunks if chunk.usage_metadata) > 0


def test_a_stream_of_the_asynchronous_client(real, chat):
    async def text():
        return "".join([chunk.content async for chunk in chat.astream(real.prompt)])

    assert asyncio.run(text()) == real.answer


def test_a_batch(real, chat):
    assert [answer.content for answer in chat.batch([real.prompt] * 3)] == [real.answer] * 3


def test_the_responses_api(real):
    chat = at(real.gateway, real.model, max_tokens=real.max_tokens, temperature=0, use_responses_api=True)
    assert chat.invoke(real.prompt).text == real.answer
    assert "".join(chunk.text for chunk in chat.stream(real.prompt)) == real.answer


def test_an_unknown_model(real):
    with pytest.raises(openai.NotFoundError):
        at(real.gateway, "nope").invoke("hello")
    with pytest.raises(openai.NotFoundError):
        list(at(real.gateway, "nope").stream("hello"))


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(real, method):
    chat = at(real.gateway, real.model, max_tokens=100)
    found = chat.with_structured_output(Weather, method=method).invoke("the weather, as JSON")
    assert found.city in ("Rome", "Paris")


def test_log_probabilities_come_with_the_answer(chat):
    answer = chat.bind(logprobs=True).invoke("hello")
    assert answer.response_metadata["logprobs"]["content"]


def test_embeddings(real):
    """Without the check, which would take OpenAI's own tokenizer from the network."""
    embed = OpenAIEmbeddings(
        base_url=real.gateway.v1, api_key="none", model=real.model, check_embedding_ctx_length=False, max_retries=0
    )
    vector = embed.embed_query("hello")
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-3)
    assert [len(one) for one in embed.embed_documents(["hello", "a red fox"])] == [len(vector)] * 2


def test_a_busy_engine_is_asked_again(scripted, new_words):
    assert at(scripted, "busy", max_retries=1).invoke(new_words).content == "one two three"


def test_an_engine_that_stays_busy(scripted):
    with pytest.raises(openai.InternalServerError, match="queue is full"):
        at(scripted, "full").invoke("hello")


def test_tools_whole_and_streamed(scripted):
    chat = at(scripted, "calls").bind_tools([weather])
    first, *rest = chat.stream("hello")
    for chunk in rest:
        first += chunk
    for answer in (chat.invoke("hello"), first):
        [call] = answer.tool_calls
        assert (call["name"], call["args"]) == ("weather", {"city": "Rome"})
        result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
        assert chat.invoke([HumanMessage("hello"), answer, result]).content == "It is 21 degrees."
