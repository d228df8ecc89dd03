"""instructor: what is a grammar in the engine, and what only asks the model for JSON."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
import pytest
from instructor.core import InstructorRetryException
from pydantic import BaseModel, ConfigDict


class Weather(BaseModel):
    # instructor sends pydantic's schema as it is, and a small model fills an open object without end.
    model_config = ConfigDict(extra="forbid")

    city: Literal["Rome", "Paris"]


def at(gateway, mode, retries=0):
    client = openai.OpenAI(base_url=gateway.v1, api_key="none", max_retries=retries)
    return instructor.from_openai(client, mode=mode)


def ask(model, **settings):
    return {"model": model, "response_model": Weather, "messages": [{"role": "user", "content": "hello"}], **settings}


def refusal(error):
    """The error below instructor's own."""
    while not isinstance(error, openai.APIStatusError):
        error = error.__cause__ or error.__context__
    return error


def test_an_answer_without_a_model_of_it(real):
    client = at(real.gateway, instructor.Mode.TOOLS)
    answer = client.create(
        model=real.model, response_model=None, messages=real.messages, max_tokens=real.max_tokens, temperature=0
    )
    assert answer.choices[0].message.content == real.answer


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_what_is_a_grammar_in_the_engine(real, mode):
    found = at(real.gateway, mode).create(**ask(real.model, max_retries=1, max_tokens=100, temperature=0))
    assert found.city in ("Rome", "Paris")


def test_an_unknown_model(real):
    with pytest.raises(InstructorRetryException) as raised:
        at(real.gateway, instructor.Mode.MD_JSON).create(**ask("nope", max_retries=1))
    assert isinstance(refusal(raised.value), openai.NotFoundError)


def test_json_in_a_block(scripted):
    client = at(scripted, instructor.Mode.MD_JSON)
    assert client.create(**ask("json")).city == "Rome"
    *_, last = client.create_partial(**ask("json"))
    assert last.city == "Rome"


def test_a_busy_engine_is_asked_again(scripted, new_words):
    client = at(scripted, instructor.Mode.TOOLS, retries=1)
    says = [{"role": "user", "content": new_words}]
    answer = client.create(model="busy", response_model=None, messages=says)
    assert answer.choices[0].message.content == "one two three"
