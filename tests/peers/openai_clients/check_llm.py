"""llm: its models are lines of a file, and it is mostly used as a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import openai
import pytest

_USER_PATH = "LLM_USER_PATH"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, real, scripted):
    """What its user would write; JSON is YAML, too."""
    models = [(real.gateway, real.model, "real"), (real.gateway, "nope", "unknown")]
    models += [(scripted, name, name) for name in ("busy", "full", "calls")]
    lines = [
        {"model_id": name, "model_name": model, "api_base": gateway.v1, "supports_tools": True, "supports_schema": True}
        for gateway, model, name in models
    ]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(lines))
    monkeypatch.setenv(_USER_PATH, str(tmp_path))
    return tmp_path


def command(*words):
    env = {**os.environ, "OPENAI_API_KEY": "none"}
    return subprocess.run([sys.executable, "-m", "llm", *words], env=env, capture_output=True, text=True, timeout=60)


def model(name):
    import llm

    found = llm.get_model(name)
    found.key = "none"
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer(real, stream):
    answer = model("real").prompt(real.prompt, stream=stream, max_tokens=real.max_tokens, temperature=0)
    assert answer.text() == real.answer
    assert answer.usage().input > 0


@pytest.mark.parametrize("words", [(), ("--no-stream",)])
def test_the_command(real, words):
    done = command(
        "-m", "real", *words, "-o", "max_tokens", str(real.max_tokens), "-o", "temperature", "0", real.prompt
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == real.answer.strip()


def test_an_unknown_model():
    with pytest.raises(openai.NotFoundError):
        model("unknown").prompt("hello").text()
    done = command("-m", "unknown", "hello")
    assert done.returncode == 1
    assert "does not exist" in done.stderr and "Traceback" not in done.stderr


def test_a_schema():
    schema = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    assert json.loads(model("real").prompt("hello", schema=schema, max_tokens=60).text()) == {"city": "Rome"}


def test_a_busy_engine_is_asked_again(new_words):
    assert model("busy").prompt(new_words).text() == "one two three"


@pytest.mark.parametrize("stream", [True, False])
def test_tools(stream):
    cities = []

    def weather(city: str) -> str:
        """Of a city."""
        cities.append(city)
        return "21"

    assert model("calls").chain("hello", tools=[weather], stream=stream).text() == "It is 21 degrees."
    assert cities == ["Rome"]
