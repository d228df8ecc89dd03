"""Gateways that share a real redis-server: responses, quotas, kept answers; and Redis or a gateway killed meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashserve_gateway.keys import new_key
from flashserve_gateway.settings import Settings
from flashserve_gateway.store import connection, shared_quotas
from flashserve_gateway.store.connection import RedisConnection
from flashserve_gateway.store.interface import StoreAway
from flashserve_gateway.store.redis_store import RedisShelf
from gateway_peers import AT_ONCE, Gate, MemoryTransport, endless, gate, says
from redis_peer import PROGRAM, RedisPeer, redis_server

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs redis-server (apt install redis-server)")

RESPONSE = {"model": "demo", "input": "hello"}


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[RedisPeer]:
    monkeypatch.setattr(connection, "_LOOK_S", 0.05)
    monkeypatch.setattr(connection, "ANSWER_S", 2.0)  # a busy machine's Redis is not to seem away
    with redis_server() as server:
        yield server


class Keys:
    """A keys file and the settings of gateways with it."""

    def __init__(self, folder: Path, peer: RedisPeer, names: tuple[str, ...] = ("alice",), **limits: Any) -> None:
        made = [new_key(name) for name in names]
        path = folder / "keys.json"
        path.write_text(json.dumps([{**entry, **limits} for _, entry in made]))
        self.headers = [{"authorization": f"Bearer {key}"} for key, _ in made]
        self.settings = replace(AT_ONCE, keys_file=path, redis=peer.url)


@contextlib.asynccontextmanager
async def two_gates(settings: Settings, headers: dict[str, str] | None = None) -> AsyncIterator[tuple[Gate, Gate]]:
    """Each with an engine of its own, which says "one two three"."""
    async with gate(settings=settings) as first, gate(settings=settings) as second:
        for one in (first, second):
            one.http.headers.update(headers or {})
        yield first, second


async def until(condition: Any, within_s: float = 10.0) -> None:
    async def wait() -> None:
        while not await condition():
            await asyncio.sleep(0.01)

    await asyncio.wait_for(wait(), within_s)


async def redis_is(gateway: Gate, state: str) -> None:
    async def same() -> bool:
        return bool((await gateway.http.get("/health")).json()["redis"] == state)

    await until(same)


async def test_a_conversation_goes_on_at_another_gateway(tmp_path: Path, peer: RedisPeer) -> None:
    keys = Keys(tmp_path, peer, ("alice", "bob"))
    alice, bob = keys.headers
    async with two_gates(keys.settings, alice) as (first, second):
        made = (await first.http.post("/v1/responses", json=RESPONSE)).json()
        assert made["store"] is True
        more = {"model": "demo", "input": "more", "previous_response_id": made["id"]}
        assert (await second.http.post("/v1/responses", json=more)).status_code == 200
        assert [message["content"] for message in second.engine.asked[0].chat["messages"]] == [
            "hello", "one two three", "more",
        ]  # fmt: skip
        assert (await second.http.get(f"/v1/responses/{made['id']}")).json() == made
        assert (await second.http.get(f"/v1/responses/{made['id']}", headers=bob)).status_code == 404
        assert (await second.http.post("/v1/responses", json=more, headers=bob)).status_code == 404
        assert (await second.http.delete(f"/v1/responses/{made['id']}")).status_code == 200
        assert (await first.http.get(f"/v1/responses/{made['id']}")).status_code == 404
        for key in peer.client().scan_iter("flashserve:*"):
            assert peer.client().ttl(key) > 0, key  # nothing stays for ever


async def test_owners_and_names_are_not_mixed_up(peer: RedisPeer) -> None:
    shared = RedisConnection(peer.url)
    await shared.start()
    shelf = RedisShelf(shared, "response", 60)
    assert await shelf.put("a", "b:c", b"1")
    assert await shelf.get("a:b", ["c"]) == [None] and await shelf.get("a", ["x", "b:c"]) == [None, b"1"]
    assert not await shelf.put("a", "large", bytes((8 << 20) + 1))
    assert await shelf.get("a", ["large"]) == [None]
    await shared.aclose()


async def test_places_are_counted_over_all_gateways_and_given_back(tmp_path: Path, peer: RedisPeer) -> None:
    keys = Keys(tmp_path, peer, requests_in_flight=2)
    async with two_gates(keys.settings, keys.headers[0]) as (first, second):
        first.engine.script = second.engine.script = endless
        running = [asyncio.create_task(one.chat(stream=True)) for one in (first, second)]
        for one in (first, second):
            await until(lambda one=one: asyncio.sleep(0, bool(one.engine.asked)))
        for one in (first, second):
            refused = await one.chat()
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        first.engine.script = says("a")
        running[1].cancel()
        assert await second.ended() == "cancelled"
        await until(lambda: _is(200, first.chat()))
        assert [(await first.chat()).status_code for _ in range(5)] == [
            200
        ] * 5  # one after the other has a place each time
        running[0].cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await until(lambda: asyncio.sleep(0, peer.client().zcard("flashserve:places:alice") == 0))


async def _is(status: int, asking: Any) -> bool:
    return bool((await asking).status_code == status)


async def test_tokens_are_counted_over_all_gateways(tmp_path: Path, peer: RedisPeer) -> None:
    keys = Keys(tmp_path, peer, tokens_per_minute=6)
    async with two_gates(keys.settings, keys.headers[0]) as (first, second):
        assert (await first.chat()).status_code == 200  # three tokens read and three written
        refused = await second.chat()
        assert refused.status_code == 429
        assert refused.json()["error"]["message"] == "this key may use 6 tokens per minute"
        assert 0 < int(refused.headers["retry-after-ms"]) <= 10_000
        tokens = float(peer.client().hget("flashserve:tokens:alice", "tokens") or -1)
        assert 0 <= tokens < 6  # a fraction: what came back since


async def test_tokens_that_a_request_did_not_use_come_back(tmp_path: Path, peer: RedisPeer) -> None:
    keys = Keys(tmp_path, peer, tokens_per_minute=100_000)
    async with two_gates(keys.settings, keys.headers[0]) as (first, second):
        first.engine.script = endless
        running = asyncio.create_task(first.chat(stream=True, max_tokens=99_999))
        await until(lambda: asyncio.sleep(0, bool(first.engine.asked)))
        assert float(peer.client().hget("flashserve:tokens:alice", "tokens") or -1) < 5000
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert await first.ended() == "cancelled"
        await until(lambda: asyncio.sleep(0, _tokens(peer) > 90_000))
        assert (await second.chat()).status_code == 200


def _tokens(peer: RedisPeer) -> float:
    return float(peer.client().hget("flashserve:tokens:alice", "tokens") or -1)


_HOLDER = """
import asyncio, sys, dataclasses
from pathlib import Path
from flashserve_gateway.store import shared_quotas
from gateway_peers import AT_ONCE, MemoryTransport, endless, gate
shared_quotas.LEASE_S = 1.0
async def main(url, keys, header):
    settings = dataclasses.replace(AT_ONCE, redis=url, keys_file=Path(keys))
    async with gate(MemoryTransport(endless), settings) as gateway:
        gateway.http.headers["authorization"] = header
        asyncio.create_task(gateway.chat(stream=True))
        while not gateway.engine.asked:
            await asyncio.sleep(0.01)
        print("holds", flush=True)
        await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_gateway_does_not_keep_its_places(
    tmp_path: Path, peer: RedisPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_quotas, "LEASE_S", 1.0)
    keys = Keys(tmp_path, peer, requests_in_flight=2)
    paths = ":".join(path for path in sys.path if path)
    line = [sys.executable, "-c", _HOLDER, peer.url, str(keys.settings.keys_file), keys.headers[0]["authorization"]]
    with subprocess.Popen(line, stdout=subprocess.PIPE, env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"}) as holder:
        try:
            assert holder.stdout is not None
            assert await asyncio.to_thread(holder.stdout.readline) == b"holds\n"
            async with gate(MemoryTransport(endless), keys.settings) as gateway:
                gateway.http.headers.update(keys.headers[0])
                running = asyncio.create_task(gateway.chat(stream=True))
                await until(lambda: asyncio.sleep(0, bool(gateway.engine.asked)))
                before = _ends(peer)
                # Both renew what they hold: each place outlives its first lease.
                await until(lambda: asyncio.sleep(0, min(_ends(peer), default=0.0) > max(before) + 1000))
                assert (await gateway.chat()).status_code == 429
                holder.kill()
                gateway.engine.script = says("a")
                await until(lambda: _is(200, gateway.chat()))
                running.cancel()
        finally:
            holder.kill()


def _ends(peer: RedisPeer) -> list[float]:
    """When the places end, by Redis' clock."""
    places = peer.client().zrange("flashserve:places:alice", 0, -1, withscores=True)
    return [score for _, score in places]


async def test_redis_away_and_back(tmp_path: Path, peer: RedisPeer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flashserve_gateway")
    keys = Keys(tmp_path, peer, requests_in_flight=2, tokens_per_minute=100_000)
    settings = replace(keys.settings, cache_answers_s=60)
    async with two_gates(settings, keys.headers[0]) as (first, _):
        made = (await first.http.post("/v1/responses", json=RESPONSE)).json()
        assert (await first.chat(seed=1)).headers["x-cache"] == "miss"
        await redis_is(first, "connected")
        caplog.clear()
        peer.kill()
        for _ in range(5):
            answer = await first.chat(seed=1)
            assert answer.status_code == 200 and "x-cache" not in answer.headers
        refused = await first.http.post("/v1/responses", json={**RESPONSE, "previous_response_id": made["id"]})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "response_store_unavailable"
        assert refused.json()["error"]["param"] == "previous_response_id"
        for method in ("GET", "DELETE"):
            assert (await first.http.request(method, f"/v1/responses/{made['id']}")).status_code == 503
        whole = await first.http.post("/v1/responses", json=RESPONSE)
        assert whole.status_code == 200 and whole.json()["store"] is False  # it says so: it cannot be gone on from
        health = await first.http.get("/health")
        assert health.status_code == 200 and health.json()["redis"] == "away"
        assert "flashserve_gateway:redis_connected 0.0" in (await first.http.get("/metrics")).text
        # Its limits are the gateway's own meanwhile.
        first.engine.script = endless
        before = len(first.engine.asked)
        running = [asyncio.create_task(first.chat(stream=True)) for _ in range(2)]
        await until(lambda: asyncio.sleep(0, len(first.engine.asked) == before + 2))
        assert (await first.chat()).status_code == 429
        assert sum("Redis is away" in record.getMessage() for record in caplog.records) <= 2  # of each gateway one
        peer.start()
        await redis_is(first, "connected")
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        first.engine.script = says("again")
        await until(lambda: _is(200, first.chat(seed=1)))
        assert (await first.chat(seed=1)).headers["x-cache"] == "hit"


async def test_a_redis_that_hangs_or_keeps_nothing_counts_as_away(peer: RedisPeer) -> None:
    async with gate(settings=replace(AT_ONCE, redis=peer.url, cache_answers_s=60)) as gateway:
        peer.send(signal.SIGSTOP)
        assert [(await gateway.chat(seed=1)).status_code for _ in range(10)] == [200] * 10
        await redis_is(gateway, "away")
        peer.send(signal.SIGCONT)
        await redis_is(gateway, "connected")
        peer.client().config_set("maxmemory", 1)  # full: it reads and does not write
        await redis_is(gateway, "away")
        assert (await gateway.chat(seed=2)).status_code == 200
        peer.client().config_set("maxmemory", 0)
        await redis_is(gateway, "connected")


async def test_one_that_is_away_is_not_asked(peer: RedisPeer) -> None:
    peer.kill()
    gone = RedisConnection(peer.url)
    await gone.start()
    for _ in range(3):
        with pytest.raises(StoreAway):
            await gone.ask(lambda: pytest.fail("it was asked"))
    await gone.aclose()


async def test_many_questions_at_once_wait_for_their_turn(peer: RedisPeer) -> None:
    shared = RedisConnection(peer.url)
    await shared.start()
    answers = await asyncio.gather(*(shared.ask(lambda n=n: shared.redis.echo(str(n))) for n in range(300)))
    assert answers == [str(n).encode() for n in range(300)]
    assert not shared.is_away and len(peer.client().client_list()) <= 35
    await shared.aclose()


async def test_a_gateway_starts_without_its_redis(peer: RedisPeer) -> None:
    peer.kill()
    async with gate(settings=replace(AT_ONCE, redis=peer.url)) as gateway:
        assert (await gateway.chat()).status_code == 200
        await redis_is(gateway, "away")
        peer.start()
        await redis_is(gateway, "connected")


async def test_redis_killed_under_load_leaves_whole_answers_and_errors(tmp_path: Path, peer: RedisPeer) -> None:
    keys = Keys(tmp_path, peer, requests_in_flight=12, tokens_per_minute=10**9)
    settings = replace(keys.settings, cache_answers_s=60)
    is_over = asyncio.Event()
    statuses: list[int] = []

    async def ask(gateway: Gate, number: int) -> None:
        while not is_over.is_set():
            number += 16
            stream = number % 2 == 0
            answer = await gateway.chat(seed=number % 7, stream=stream)
            statuses.append(answer.status_code)
            if answer.status_code == 200 and stream:
                events = answer.text.split("\n\n")
                assert events[-2:] == ["data: [DONE]", ""]
                pieces = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
                text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces)
                assert text == "one two three"
            elif answer.status_code == 200:
                assert answer.json()["choices"][0]["message"]["content"] == "one two three"
            else:
                assert answer.status_code == 429  # sixteen want twelve places
                await asyncio.sleep(0.01)

    async with two_gates(settings, keys.headers[0]) as gates:
        tasks = [asyncio.create_task(ask(gates[number % 2], number)) for number in range(16)]
        for _ in range(3):
            await asyncio.sleep(0.3)
            peer.kill()
            await asyncio.sleep(0.2)
            peer.start()
        is_over.set()
        await asyncio.gather(*tasks)
        assert 200 in statuses
        for one in gates:
            await redis_is(one, "connected")
            assert one.pool.in_flight() == 0
            assert all(asked.ended for asked in one.engine.asked)
        await until(lambda: asyncio.sleep(0, peer.client().zcard("flashserve:places:alice") == 0))


async def test_kept_answers_are_shared(peer: RedisPeer) -> None:
    settings = replace(AT_ONCE, redis=peer.url, cache_answers_s=60)
    async with two_gates(settings) as (first, second):
        assert (await first.chat(temperature=0)).headers["x-cache"] == "miss"
        assert (await second.chat(temperature=0)).headers["x-cache"] == "hit"
        assert not second.engine.asked


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://", "redis://:pw@host:99999",
                                 "redis://:pw@[", "redis://host?retry=1", "unix://"])  # fmt: skip
def test_a_url_that_cannot_be_used_is_told_without_its_password(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flashserve_gateway.command import main

    with pytest.raises(SystemExit):
        main(["--redis", url, "--check"])
    told = capsys.readouterr().err
    assert "--redis" in told and "pw" not in told


def test_urls_that_can_be_used(tmp_path: Path) -> None:
    from flashserve_gateway.command import main

    for url in (
        "redis://localhost",
        "redis://:secret@host:6380/1",
        "rediss://host?ssl_cert_reqs=none",
        "unix:///r.sock?db=2",
    ):
        assert main(["--redis", url, "--cache-answers", "60", "--check"]) == 0
        RedisConnection(url)
