"""Other people's clients, unchanged, against the gateway: `make openai-clients`.

They lie in environments of their own, where the checks of tests/peers/openai_clients run: each against a real
tritonserver with a small instruct model, and against an engine that says what a test needs (calls of tools, a queue
that is full), which no small model does reliably.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from flashserve.errors import ConfigError
from flashserve.model_location import locate
from flashserve_client import Unavailable
from flashserve_client.transport import Chunk
from gateway_peers import Asked, MemoryTransport, fails, gate, says
from harness import ROOT, Server, wait_until
from real_models import SMOLLM2

CHECKS = ROOT / "tests" / "peers" / "openai_clients"
CLIENTS, INSTRUCTOR = ROOT / ".venv-openai-clients", ROOT / ".venv-instructor"
ENVIRONMENTS = {
    "anthropic": CLIENTS,
    "langchain": CLIENTS,
    "litellm": CLIENTS,
    "llm": CLIENTS,
    "openai_agents": CLIENTS,
    "pydantic_ai": CLIENTS,
    "instructor": INSTRUCTOR,
}
MAX_TOKENS = 16
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
CALL = ['<tool_call>{"name": "weather", ', '"arguments": {"city": ', '"Rome"', "}}</tool_call>"]
SAYINGS = {
    "json": ["```json\n", '{"city": ', '"Rome"}', "\n```"],
    "thinks": ["<think>", "hm ", "so", "</think>", "\n\nRome ", "it is"],
}
pytestmark = pytest.mark.slow


def answer(asked: Asked, refused: set[str]) -> AsyncIterator[Chunk]:
    """What the engine in memory says, by the model's name; ``refused`` are the chats that `busy` has refused."""
    model, chat = asked.request.model, json.dumps(asked.chat["messages"])
    if model == "full" or (model == "busy" and chat not in refused):
        refused.add(chat)
        return fails(Unavailable("the queue is full", retry_after_ms=10))(asked)
    if model == "calls":
        has_result = asked.chat["messages"][-1]["role"] == "tool"
        return says(*(["It is ", "21 degrees."] if has_result else CALL))(asked)
    return says(*SAYINGS.get(model, ["one ", "two ", "three"]))(asked)


@pytest.fixture(scope="module")
def scripted() -> Iterator[str]:
    """The URL of a gateway in front of the engine in memory."""
    refused: set[str] = set()
    engine = MemoryTransport(lambda asked: answer(asked, refused), names=("busy", "full", "calls", *SAYINGS))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    running = gate(engine)
    try:
        yield asyncio.run_coroutine_threadsafe(running.__aenter__(), loop).result(30).url
        asyncio.run_coroutine_threadsafe(running.__aexit__(None, None, None), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def real() -> Iterator[dict[str, Any]]:
    """A model that talks, if it is installed, and what it says without any client between."""
    try:
        locate(SMOLLM2)
        model = {"model": SMOLLM2}
    except ConfigError:
        model = {"model": str(ROOT / "model_repository" / "demo" / "1" / "weights")}
    with Server({"real": model}, gateway=True) as server:
        with httpx.Client(base_url=server.gateway, trust_env=False, timeout=60) as http:

            def is_ready() -> bool:
                try:
                    return http.get("/ready").status_code == 200
                except httpx.TransportError:
                    return False

            assert wait_until(is_ready, 30), server.log[-4000:]
            body = {"model": "real", "messages": QUESTION, "max_tokens": MAX_TOKENS, "temperature": 0}
            said = http.post("/v1/chat/completions", json=body).json()["choices"][0]
        yield {
            "url": server.gateway,
            "model": "real",
            "messages": QUESTION,
            "max_tokens": MAX_TOKENS,
            "answer": said["message"]["content"],
            "has_ended": said["finish_reason"] == "stop",
        }


@pytest.mark.timeout(300)  # some of these packages take many seconds to import
@pytest.mark.parametrize("client", ENVIRONMENTS)
def test_client(client: str, request: pytest.FixtureRequest) -> None:
    environment = ENVIRONMENTS[client]
    if not (environment / ".installed").exists():
        pytest.skip(f"no {client} in {environment.name}: make openai-clients installs it")
    real, scripted = request.getfixturevalue("real"), request.getfixturevalue("scripted")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {
        "FLASHSERVE_REAL": json.dumps(real),
        "FLASHSERVE_SCRIPTED": scripted,
        "NO_PROXY": "127.0.0.1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it asks the internet for prices
    }
    command = [
        environment / "bin" / "python",
        "-m",
        "pytest",
        "-c",
        CHECKS / "pytest.ini",
        CHECKS / f"check_{client}.py",
    ]
    done = subprocess.run(command, env=env, cwd=CHECKS, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
