"""API keys: who is let in, and how much of what."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from flashserve_gateway.errors import ApiError
from flashserve_gateway.keys import Caller, Key, KeysFileError, hash_key, new_key, read_keys
from flashserve_gateway.settings import Settings
from gateway_peers import MemoryTransport, endless, gate


def write(tmp_path: Path, **limits: Any) -> tuple[str, Settings]:
    """A file with one key, and that key."""
    key, entry = new_key("alice")
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{**entry, **limits}]))
    return key, Settings(keys_file=path)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def test_a_key_lets_in_under_both_headers_and_its_absence_does_not(tmp_path: Path, caplog):
    caplog.set_level(logging.DEBUG)
    key, settings = write(tmp_path)
    async with gate(settings=settings) as gateway:
        halves = ({"authorization": "Bearer"}, {"authorization": key}, {"x-api-key": key[:-1]})
        for headers in ({}, bearer("wrong"), *halves):
            gateway.http.headers = headers
            for path in ("/v1/models", "/v1/models/demo"):
                response = await gateway.http.get(path)
                assert response.status_code == 401, headers
                assert response.json()["error"]["code"] == "invalid_api_key"
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
                assert (await gateway.http.post(path, json={})).status_code == 401
        assert not gateway.engine.asked
        for headers in (bearer(key), {"x-api-key": key}):
            gateway.http.headers = headers
            assert (await gateway.chat()).status_code == 200
        gateway.http.headers = {}
        for path in ("/live", "/ready"):  # probes have none
            assert (await gateway.http.get(path)).status_code == 200
    assert key not in caplog.text and key not in settings.keys_file.read_text()


async def test_requests_in_flight_are_bounded(tmp_path: Path):
    key, settings = write(tmp_path, requests_in_flight=2)
    async with gate(MemoryTransport(endless), settings) as gateway:
        gateway.http.headers = bearer(key)
        running = [asyncio.create_task(gateway.chat(stream=True)) for _ in range(2)]
        while len(gateway.engine.asked) < 2:
            await asyncio.sleep(0.005)
        response = await gateway.chat()
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert [await gateway.ended(number) for number in (0, 1)] == ["cancelled"] * 2
        running = [asyncio.create_task(gateway.chat(stream=True))]
        while len(gateway.engine.asked) < 3:
            await asyncio.sleep(0.005)
        running[0].cancel()


async def test_tokens_that_were_used_are_waited_for(tmp_path: Path):
    key, settings = write(tmp_path, tokens_per_minute=6)
    async with gate(settings=settings) as gateway:  # an answer takes three tokens and gives three
        gateway.http.headers = bearer(key)
        assert (await gateway.chat()).status_code == 200
        response = await gateway.chat()
        assert response.status_code == 429
        assert 0 < float(response.headers["retry-after"]) <= 10


def test_the_bucket_fills_with_time():
    now = 0.0
    caller = Caller(Key("alice", "", tokens_per_minute=60), lambda: now)
    caller.charge(90)  # an answer longer than what was left
    with pytest.raises(ApiError) as refused, caller.admit("demo"):
        pass
    assert refused.value.retry_after_s == 31
    now = 31.0
    with caller.admit("demo"):
        caller.charge(1)
    now = 1000.0  # it holds a minute's tokens, not an hour's
    with caller.admit("demo"):
        caller.charge(61)
    with pytest.raises(ApiError), caller.admit("demo"):
        pass


async def test_a_model_that_is_not_the_keys_does_not_exist(tmp_path: Path):
    key, settings = write(tmp_path, models=["demo"])
    async with gate(MemoryTransport(names=("demo", "secret")), settings) as gateway:
        gateway.http.headers = bearer(key)
        assert [row["id"] for row in (await gateway.http.get("/v1/models")).json()["data"]] == ["demo"]
        hidden, unknown = [await gateway.chat(model=model) for model in ("secret", "nothere")]
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.text.replace("secret", "nothere") == unknown.text
        assert (await gateway.http.get("/v1/models/secret")).status_code == 404
        assert (await gateway.http.post("/tokenize", json={"model": "secret", "prompt": "a"})).status_code == 404


@pytest.mark.parametrize(("asked", "expected"), [(None, 5), (9, 9), (-100, 5), (0, 5)])
async def test_a_request_cannot_overtake_its_keys_priority(tmp_path: Path, asked: int | None, expected: int):
    key, settings = write(tmp_path, priority=5)
    async with gate(settings=settings) as gateway:
        gateway.http.headers = bearer(key)
        assert (await gateway.chat(priority=asked)).status_code == 200
        assert gateway.engine.asked[0].sampling["priority"] == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "keys.json"),
        ("[]", "at least one"),
        ("{}", "must be a list"),
        ("[1]", "entry 0 is not an object"),
        ('[{"sha256": "%s"}]', "name must be"),
        ('[{"name": "a", "sha256": "secret"}]', "sha256 must be 64"),
        ('[{"name": "a", "sha256": "%s", "tokens": 5}]', "unknown field 'tokens'"),
        ('[{"name": "a", "sha256": "%s", "requests_in_flight": 0}]', "requests_in_flight must be"),
        ('[{"name": "a", "sha256": "%s", "models": "demo"}]', "models must be"),
        ('[{"name": "a", "sha256": "%s", "priority": "high"}]', "priority must be"),
        ('[{"name": "a", "sha256": "%s"}, {"name": "b", "sha256": "%s"}]', "the same sha256"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, content: str, words: str):
    path = tmp_path / "keys.json"
    path.write_text(content.replace("%s", hash_key("x")))
    with pytest.raises(KeysFileError, match=words):
        read_keys(path)
