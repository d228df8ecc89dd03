"""What a request takes of its key and of the gateway, and that it is settled however the request ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from flashserve_client import InvalidRequest
from flashserve_gateway.errors import ApiError
from flashserve_gateway.incoming import Bodies
from flashserve_gateway.keys import Caller, Key, new_key
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import CHAT, Gate, MemoryTransport, endless, fails, gate, says, silent

MESSAGE = {"model": "demo", "max_tokens": 5, "messages": CHAT["messages"]}


def keyed(tmp_path: Path, **limits: Any) -> tuple[dict[str, str], Settings]:
    """The header of a key with these limits, and settings with it."""
    key, entry = new_key("alice")
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{**entry, **limits}]))
    return {"authorization": f"Bearer {key}"}, Settings(keys_file=path)


async def leave(gateway: Gate, **body: Any) -> None:
    """Asks, and goes away once the engine has the request."""
    before = len(gateway.engine.asked)
    task = asyncio.create_task(gateway.chat(**body))
    while len(gateway.engine.asked) == before:
        await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await gateway.ended() == "cancelled"


# --- tokens ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_that_is_cut_off_is_not_free(tmp_path: Path, stream: bool):
    headers, settings = keyed(tmp_path, tokens_per_minute=10)
    async with gate(MemoryTransport(silent), settings) as gateway:
        gateway.http.headers = headers
        await leave(gateway, stream=stream, messages=[{"role": "user", "content": "hello " * 50}])
        assert (await gateway.chat()).status_code == 429
        assert len(gateway.engine.asked) == 1


async def test_of_a_whole_answer_that_is_cut_off_all_that_was_reserved_is_charged(tmp_path: Path):
    """How much was written of it nobody knows."""
    headers, settings = keyed(tmp_path, tokens_per_minute=60)
    async with gate(MemoryTransport(silent), settings) as gateway:
        gateway.http.headers = headers
        await leave(gateway, max_tokens=60)
        assert (await gateway.chat()).status_code == 429


async def test_requests_that_come_together_share_the_minute(tmp_path: Path):
    headers, settings = keyed(tmp_path, tokens_per_minute=10)
    async with gate(MemoryTransport(silent), settings) as gateway:
        gateway.http.headers = headers
        tasks = [asyncio.create_task(gateway.chat(max_tokens=50)) for _ in range(20)]
        done, running = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        while len(done) < 19:
            more, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            done |= more
        assert {task.result().status_code for task in done} == {429}
        for task in running:
            task.cancel()


async def test_what_was_reserved_and_not_used_is_given_back(tmp_path: Path):
    headers, settings = keyed(tmp_path, tokens_per_minute=100)
    async with gate(settings=settings) as gateway:  # an answer takes three tokens and gives three
        gateway.http.headers = headers
        for _ in range(10):
            assert (await gateway.chat(max_tokens=80)).status_code == 200
        gateway.engine.script = fails(InvalidRequest("seed must be an integer"))
        for _ in range(50):  # the engine did nothing
            assert (await gateway.chat(max_tokens=80)).status_code == 400
        gateway.engine.script = says("one")
        assert (await gateway.chat(max_tokens=80)).status_code == 200


def test_an_admission_charges_beyond_its_reservation_at_once_and_settles_once():
    caller = Caller(Key("alice", "", tokens_per_minute=60), lambda: 0.0)
    with caller.admit("demo", tokens=50) as admission:
        admission.use(40)
        with caller.admit("demo"):  # 10 are left beside what is reserved
            pass
        admission.use(20)
        with pytest.raises(ApiError), caller.admit("demo"):
            pass
    with pytest.raises(ApiError) as refused, caller.admit("demo"):
        pass
    assert refused.value.retry_after_s == 1
    with pytest.raises(ZeroDivisionError), Caller(Key("bob", "", tokens_per_minute=60)).admit("demo", tokens=60):
        raise ZeroDivisionError


# --- places ------------------------------------------------------------------------------------------------------


async def test_more_answers_than_a_key_may_have_in_flight_are_refused_for_good(tmp_path: Path):
    headers, settings = keyed(tmp_path, requests_in_flight=2)
    async with gate(settings=settings) as gateway:
        gateway.http.headers = headers
        several = {"model": "demo", "prompt": ["a", "b", "c"]}
        for response in (await gateway.chat(n=4), await gateway.http.post("/v1/completions", json=several)):
            assert response.status_code == 400
            assert "n, prompt" in response.json()["error"]["message"]
        assert not gateway.engine.asked
        assert (await gateway.chat(n=2)).status_code == 200
        gateway.engine.script = endless
        running = asyncio.create_task(gateway.chat(stream=True))
        while len(gateway.engine.asked) < 3:
            await asyncio.sleep(0.005)
        assert (await gateway.chat(n=2)).status_code == 429
        assert len(gateway.engine.asked) == 3  # none of the two was started
        running.cancel()


# --- before anything is asked of a server ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}),
        ("/v1/messages", {**MESSAGE, "stream": True}),
        ("/v1/completions", {"prompt": [72, 105], "echo": True, "stream": True}),
        ("/v1/completions", {"prompt": [72, 105], "echo": True}),
        ("/v1/responses", {"input": "hello", "stream": True}),
        ("/tokenize", {"prompt": "hello"}),
    ],
)
async def test_a_hidden_model_is_like_none(tmp_path: Path, path: str, body: dict[str, Any]):
    headers, settings = keyed(tmp_path, models=["other"])
    async with gate(settings=settings) as gateway:
        gateway.http.headers = headers
        hidden, unknown = [await gateway.http.post(path, json={**body, "model": name}) for name in ("demo", "nope")]
        assert hidden.status_code == unknown.status_code == 404
        assert hidden.text == unknown.text.replace("nope", "demo")


async def test_a_tokenizer_is_not_asked_for_a_request_over_its_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    headers, settings = keyed(tmp_path, tokens_per_minute=1)
    async with gate(settings=settings) as gateway:
        gateway.http.headers = headers
        assert (await gateway.chat()).status_code == 200

        async def never(*arguments: Any, **options: Any) -> None:
            raise AssertionError("asked")

        for name in ("tokenize", "detokenize", "prompt_ends_with"):
            monkeypatch.setattr(gateway.pool, name, never)
        for path, body in (
            ("/v1/messages", {**MESSAGE, "stream": True}),
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"model": "demo", "prompt": [72], "echo": True, "stream": True}),
            ("/v1/responses", {"model": "demo", "input": "a"}),
        ):
            assert (await gateway.http.post(path, json=body)).status_code == 429, path


# --- what operators see ------------------------------------------------------------------------------------------


async def test_with_keys_figures_need_one_and_name_only_its_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    headers, settings = keyed(tmp_path, models=["demo"])
    async with gate(MemoryTransport(names=("demo", "secret")), settings) as gateway:
        for path in ("/operations", "/metrics"):
            assert (await gateway.http.get(path)).status_code == 401
        ready = await gateway.http.get("/ready")
        assert ready.json() == {"status": "ready", "detail": {"models": "2 of 2 answer"}}
        assert (await gateway.http.get("/metrics", headers=headers)).status_code == 403

        class Figures:
            async def models(self) -> dict[str, dict[str, Any]]:
                return {"demo": {}, "secret": {}}

            async def aclose(self) -> None:
                pass

        monkeypatch.setattr("flashserve_gateway.engine_metrics.EngineMetrics.models", Figures.models)
        assert set((await gateway.http.get("/operations", headers=headers)).json()["models"]) == {"demo"}


# --- bodies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [150, 300, 1000])
async def test_deep_bodies_are_refused_before_the_engine_works(levels: int):
    """orjson reads 1,024 levels, and neither it nor json writes so many again."""
    deep = b'{"a": ' + b"[" * levels + b"]" * levels + b"}"
    fields = (
        ("/v1/chat/completions", b'"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": %s'),
        ("/v1/messages", b'"max_tokens": 5, "messages": [{"role": "assistant", "content": [{"type": "tool_use",'
         b'"id": "x", "name": "f", "input": %s}]}, {"role": "user", "content": "a"}]'),
        ("/v1/responses", b'"input": "a", "metadata": %s'),
    )  # fmt: skip
    async with gate() as gateway:
        for path, field in fields:
            content = b'{"model": "demo", ' + field % deep + b"}"
            response = await gateway.http.post(path, content=content, headers={"content-type": "application/json"})
            assert response.status_code == 400, path
            assert "nested" in response.text
        assert not gateway.engine.asked


async def test_bodies_together_are_bounded():
    async with gate(settings=Settings(limits=Limits(bodies_bytes=10_000))) as gateway:
        url = httpx.URL(gateway.url)
        _, writer = await asyncio.open_connection(url.host, url.port)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 20000\r\n\r\n".encode() + b" " * 9_900)
        await writer.drain()
        for _ in range(100):
            response = await gateway.chat(user="u" * 500)
            if response.status_code == 503:
                break
            await asyncio.sleep(0.01)
        assert response.status_code == 503 and response.headers["retry-after"] == "1"
        writer.close()
        for _ in range(100):
            response = await gateway.chat(user="u" * 500)
            if response.status_code == 200:
                break
            await asyncio.sleep(0.01)
        assert response.status_code == 200


def test_bodies_give_back_what_they_took():
    bodies = Bodies(10)
    for _ in range(3):
        with pytest.raises(ApiError), bodies.receiving() as take:
            take(8)
            take(3)
    with bodies.receiving() as take:
        take(10)
