"""The answer cache of one gateway: what is kept, for whom, and how it is given again."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashserve_client import InternalError
from flashserve_gateway.keys import new_key
from flashserve_gateway.settings import Settings
from gateway_peers import AT_ONCE, CHAT, Gate, MemoryTransport, fails, gate, says

KEEPING = replace(AT_ONCE, cache_answers_s=60)


def text_of(chunks: list[dict[str, Any]]) -> list[str]:
    return [
        choice["delta"]["content"] for chunk in chunks for choice in chunk["choices"] if choice["delta"].get("content")
    ]


async def test_an_identical_request_gets_the_same_answer_under_its_own_id() -> None:
    async with gate(settings=KEEPING) as gateway:
        answers = [await gateway.chat(temperature=0) for _ in range(3)]
        assert [answer.headers["x-cache"] for answer in answers] == ["miss", "hit", "hit"]
        bodies = [answer.json() for answer in answers]
        assert len({body["id"] for body in bodies}) == 3
        assert all(body["choices"] == bodies[0]["choices"] and body["usage"] == bodies[0]["usage"] for body in bodies)
        assert len(gateway.engine.asked) == 1
        figures = (await gateway.http.get("/metrics")).text
        assert 'flashserve_gateway:answer_cache_total{outcome="hit"} 2.0' in figures
        assert 'flashserve_gateway:answer_cache_total{outcome="miss"} 1.0' in figures
        assert 'flashserve_gateway:generation_tokens_total{model="demo"} 3.0' in figures  # an engine wrote them once


async def test_a_stream_is_replayed_as_a_stream_and_shares_its_answer() -> None:
    async with gate(settings=KEEPING) as gateway:
        first, second = [await gateway.chunks(seed=7, stream_options={"include_usage": True}) for _ in range(2)]
        assert text_of(first) == text_of(second) == ["one ", "two ", "three"]
        assert first[-1]["usage"] == second[-1]["usage"]
        assert {chunk["id"] for chunk in first}.isdisjoint(chunk["id"] for chunk in second)
        response = await gateway.http.post("/v1/chat/completions", json={**CHAT, "seed": 7, "stream": True})
        assert response.headers["x-cache"] == "hit" and response.headers["content-type"].startswith("text/event-stream")
        whole = await gateway.chat(seed=7)
        assert whole.headers["x-cache"] == "hit"
        assert whole.json()["choices"][0]["message"]["content"] == "one two three"
        assert len(gateway.engine.asked) == 1
        assert (await gateway.chat(seed=8)).headers["x-cache"] == "miss"
        assert text_of(await gateway.chunks(seed=8)) == ["one two three"]  # it came at once


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 3}),
        ("/v1/chat/completions", {**CHAT, "n": 2, "seed": 3}),
        ("/v1/messages", {**CHAT, "max_tokens": 9, "temperature": 0}),
        ("/v1/responses", {"input": "hello", "temperature": 0}),
        ("/v1/generate_nobatch", {"prompt": "hello", "temperature": 0}),
    ],
)
async def test_all_endpoints_that_generate_keep_answers(path: str, body: dict[str, Any]) -> None:
    body = body if "generate" in path else {"model": "demo", **body}
    async with gate(settings=KEEPING) as gateway:
        first = await gateway.http.post(path, json=body)
        asked = len(gateway.engine.asked)
        second = await gateway.http.post(path, json=body)
        assert (first.status_code, first.headers["x-cache"], second.headers["x-cache"]) == (200, "miss", "hit")
        assert len(gateway.engine.asked) == asked
        if path == "/v1/responses":  # each is an object of its own, that can be gone on from
            more = {"model": "demo", "input": "b", "previous_response_id": second.json()["id"]}
            assert (await gateway.http.post(path, json=more)).status_code == 200
        if "generate" not in path:
            stream = await gateway.http.post(path, json={**body, "stream": True})
            assert (stream.status_code, stream.headers["x-cache"]) == (200, "hit")


async def test_what_is_not_determined_is_asked_every_time() -> None:
    async with gate(settings=KEEPING) as gateway:
        for body in ({}, {"temperature": 0.5}, {"temperature": 1}):
            for _ in range(2):
                assert "x-cache" not in (await gateway.chat(**body)).headers
        assert len(gateway.engine.asked) == 6
        embedded = await gateway.http.post("/v1/embeddings", json={"model": "demo", "input": "a"})
        assert "x-cache" not in embedded.headers
    async with gate(settings=AT_ONCE) as gateway:  # off by default
        for _ in range(2):
            assert "x-cache" not in (await gateway.chat(temperature=0)).headers
        assert len(gateway.engine.asked) == 2


async def test_any_difference_is_another_request() -> None:
    async with gate(MemoryTransport(names=("demo", "other")), KEEPING) as gateway:
        others: list[dict[str, Any]] = [
            {}, {"model": "other"}, {"max_tokens": 5}, {"seed": 2}, {"cache_salt": "x"}, {"stop": ["a"]},
            {"messages": [{"role": "user", "content": "hello "}]}, {"logprobs": True},
        ]  # fmt: skip
        for body in others:
            assert (await gateway.chat(**{"seed": 1, **body})).headers["x-cache"] == "miss", body
        for body in others:
            assert (await gateway.chat(**{"seed": 1, "priority": 3, "user": "u", **body})).headers[
                "x-cache"
            ] == "hit", body


async def test_errors_and_answers_that_break_off_are_not_kept() -> None:
    async with gate(MemoryTransport(fails(InternalError("no"), "one ")), KEEPING) as gateway:
        assert (await gateway.chat(seed=1)).status_code == 500
        broken = await gateway.http.post("/v1/chat/completions", json={**CHAT, "seed": 1, "stream": True})
        assert "error" in broken.text
        gateway.engine.script = says("whole")
        answer = await gateway.chat(seed=1)
        assert answer.headers["x-cache"] == "miss"
        assert answer.json()["choices"][0]["message"]["content"] == "whole"


async def test_an_answer_lasts_for_its_time_and_its_model() -> None:
    async with gate(settings=replace(KEEPING, cache_answers_s=0.2)) as gateway:
        assert (await gateway.chat(seed=1)).headers["x-cache"] == "miss"

        async def is_forgotten() -> None:
            while (await gateway.chat(seed=1)).headers["x-cache"] == "hit":
                await asyncio.sleep(0.02)

        await asyncio.wait_for(is_forgotten(), 10)
        gateway.engine.names = ()
        await gateway.pool.refresh()
        assert (await gateway.chat(seed=1)).status_code == 404


async def test_answers_are_their_keys_own_and_cost_no_tokens(tmp_path: Path) -> None:
    keys = [new_key(name) for name in ("alice", "bob")]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{**entry, "tokens_per_minute": 6} for _, entry in keys]))
    alice, bob = ({"authorization": f"Bearer {key}"} for key, _ in keys)

    async def ask(gateway: Gate, headers: dict[str, str], **body: Any) -> tuple[int, str | None]:
        answer = await gateway.http.post("/v1/chat/completions", json={**CHAT, **body}, headers=headers)
        return answer.status_code, answer.headers.get("x-cache")

    async with gate(settings=replace(KEEPING, keys_file=path)) as gateway:
        assert await ask(gateway, alice, seed=1) == (200, "miss")
        assert (await ask(gateway, alice, seed=2))[0] == 429
        for _ in range(3):
            assert await ask(gateway, alice, seed=1) == (200, "hit")
        assert await ask(gateway, bob, seed=1) == (200, "miss")


def test_settings_do_not_show_the_password() -> None:
    assert "secret" not in repr(Settings(redis="redis://:secret@host"))
