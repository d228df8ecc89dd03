"""Fixtures of the checks that run inside the clients' environment; tests/server/test_openai_clients.py starts them."""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import dataclass
from typing import Any

import pytest

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


@dataclass(frozen=True)
class Gateway:
    """`url` is without /v1, as Anthropic's clients want it."""

    url: str

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"


@dataclass(frozen=True)
class Real:
    """A gateway in front of a real tritonserver, and what it answered to this chat through no client at all."""

    gateway: Gateway
    model: str
    messages: list[dict[str, str]]
    max_tokens: int
    answer: str
    has_ended: bool
    """It was not cut off at `max_tokens`."""

    @property
    def prompt(self) -> str:
        return self.messages[0]["content"]


@pytest.fixture(scope="session")
def real() -> Real:
    given = json.loads(os.environ["FLASHSERVE_REAL"])
    real = Real(Gateway(given.pop("url")), **given)
    assert len(real.answer) > 10  # or an equal answer would say little
    return real


@pytest.fixture(scope="session")
def scripted() -> Gateway:
    """In front of an engine that answers by the model's name: see `answer` in tests/server/test_openai_clients.py."""
    return Gateway(os.environ["FLASHSERVE_SCRIPTED"])


@pytest.fixture
def new_words() -> str:
    """A prompt that `busy` has not seen: it refuses each one once."""
    return uuid.uuid4().hex


@pytest.fixture(scope="session")
def weather_schema() -> dict[str, Any]:
    return WEATHER


@pytest.fixture(scope="session")
def weather_tool() -> dict[str, Any]:
    """In OpenAI's form."""
    return {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": WEATHER}}
