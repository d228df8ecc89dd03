"""Engines that are full: each key gets its share, what waits is bounded, and nobody waits without need."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve_client import Unavailable
from flashserve_client.transport import Chunk
from flashserve_gateway.fair_queue import Entry, FairQueue, Share
from flashserve_gateway.keys import KeysFileError, new_key, read_keys
from flashserve_gateway.settings import Limits, Settings
from gateway_peers import Asked, Gate, MemoryTransport, fails, gate, piece

FULL = Unavailable("the queue is full: 2 requests with 6 tokens wait", retry_after_ms=900)


def entry(name: str, cost: int = 100, weight: int = 1, priority: int = 0) -> Entry[str]:
    return Entry(name, Share(name, weight), cost, priority)


# --- the queue ---------------------------------------------------------------------------------------------------


def test_a_key_with_one_request_comes_soon_whatever_others_ask_for():
    queue: FairQueue[str] = FairQueue()
    for _ in range(100):
        queue.push(entry("greedy", cost=5000))
    queue.push(entry("modest", cost=5000))
    assert "modest" in [queue.pop().item for _ in range(2)]


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=5),
    st.lists(st.integers(1, 4), min_size=5, max_size=5),
)
def test_keys_that_always_wait_get_tokens_by_their_weights(costs, weights):
    queue: FairQueue[str] = FairQueue()
    for name, cost in enumerate(costs):
        for _ in range(2):
            queue.push(entry(str(name), cost, weights[name]))
    got: Counter[str] = Counter()
    for _ in range(400):
        served = queue.pop()
        got[served.item] += served.cost
        queue.push(entry(served.item, served.cost, served.share.weight))
    shares = [got[str(name)] / weights[name] for name in range(len(costs))]
    # Deficit round robin's own bound: a quantum and the largest request.
    assert max(shares) - min(shares) <= 2 * (1024 + max(costs))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5000), st.integers(-1, 1)), max_size=40))
def test_everything_comes_out_once_better_priorities_first_and_a_keys_own_in_order(pushed):
    queue: FairQueue[int] = FairQueue()
    for number, (name, cost, priority) in enumerate(pushed):
        queue.push(Entry(number, Share(name), cost, priority))
    assert len(queue) == len(pushed)
    out = [queue.pop().item for _ in pushed]
    assert sorted(out) == list(range(len(pushed)))
    assert [pushed[number][2] for number in out] == sorted(priority for _, _, priority in pushed)
    for name in "abc":
        for priority in (-1, 0, 1):
            own = [number for number in out if pushed[number][0] == name and pushed[number][2] == priority]
            assert own == sorted(own)
    assert not queue
    with pytest.raises(IndexError):
        queue.pop()


def test_what_had_its_turn_in_vain_is_the_next_and_pays_once():
    queue: FairQueue[str] = FairQueue()
    for name in ("a", "b"):
        for _ in range(3):
            queue.push(entry(name, cost=1024))
    first = queue.pop()
    for _ in range(20):
        queue.push_back(first)
        assert queue.pop() is first
    assert Counter(queue.pop().item for _ in range(3))[first.item] <= 2


def test_who_leaves_is_taken_out_and_the_greediest_is_known():
    queue: FairQueue[str] = FairQueue()
    waiting = [entry(name, priority=priority) for name, priority in (("a", 0), ("b", 0), ("a", 5), ("a", 1))]
    for one in waiting:
        queue.push(one)
    assert queue.last_of_greediest() is waiting[2]
    queue.remove(waiting[2])
    assert (len(queue), queue.count("a"), queue.count("b")) == (3, 2, 1)
    with pytest.raises(ValueError, match="not in the queue"):
        queue.remove(waiting[2])


# --- a gateway in front of an engine with few places ---------------------------------------------------------------


class Narrow:
    """An engine with so many places and no queue; it notes whose requests it did. Closed, it ends none."""

    def __init__(self, places: int, takes_s: float = 0.01) -> None:
        self.places = places
        self.takes_s = takes_s
        self.open = asyncio.Event()
        self.running = 0
        self.most = 0
        self.refused = 0
        self.done: list[str] = []

    async def __call__(self, asked: Asked) -> AsyncIterator[Chunk]:
        if self.running >= self.places:
            self.refused += 1
            raise FULL
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.open.wait()
            await asyncio.sleep(self.takes_s)
            self.done.append(str(asked.chat["messages"][0]["content"]))
            yield piece("done", "stop")
        finally:
            self.running -= 1


def keyed(tmp_path: Path, limits: Limits, **weights: int) -> tuple[dict[str, dict[str, str]], Settings]:
    """The headers of some keys, and settings with them."""
    headers, entries = {}, []
    for name, weight in weights.items():
        key, row = new_key(name)
        headers[name] = {"authorization": f"Bearer {key}"}
        entries.append({**row, "weight": weight})
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    return headers, Settings(keys_file=path, limits=limits)


def ask(gateway: Gate, name: str, headers: dict[str, str], **body: object) -> asyncio.Task:
    messages = [{"role": "user", "content": name}]
    request = {"model": "demo", "messages": messages, "max_tokens": 100, **body}
    return asyncio.create_task(gateway.http.post("/v1/chat/completions", json=request, headers=headers))


async def waits(gateway: Gate, count: int) -> None:
    while gateway.pool.lines.waiting() < count:
        await asyncio.sleep(0.002)


async def test_a_greedy_key_does_not_starve_a_modest_one(tmp_path: Path):
    headers, settings = keyed(tmp_path, Limits(queue_wait_s=30), greedy=1, modest=1)
    engine = Narrow(2)
    async with gate(MemoryTransport(engine), settings) as gateway:
        greedy = [ask(gateway, "greedy", headers["greedy"]) for _ in range(90)]
        await waits(gateway, 88)
        modest = ask(gateway, "modest", headers["modest"])
        await waits(gateway, 89)
        refused = engine.refused
        engine.open.set()
        assert (await modest).status_code == 200
        assert engine.done.index("modest") <= 6  # those that ran, and some turns of the first round
        assert {response.status_code for response in await asyncio.gather(*greedy)} == {200}
        assert engine.most == 2 and len(engine.done) == 91
        assert gateway.pool.lines.waiting() == gateway.pool.in_flight() == 0
        assert engine.refused - refused < 200  # who waits does not keep asking


async def test_weights_and_priorities_hold(tmp_path: Path):
    headers, settings = keyed(tmp_path, Limits(queue_wait_s=30), one=1, three=3)
    engine = Narrow(1)
    async with gate(MemoryTransport(engine), settings) as gateway:
        tasks = [ask(gateway, "one", headers["one"])]
        while not engine.running:
            await asyncio.sleep(0.001)
        # Of 1024 tokens each: a quantum.
        tasks += [ask(gateway, name, headers[name], max_tokens=1000) for name in ("one", "three") for _ in range(20)]
        tasks += [ask(gateway, "late", headers["one"], priority=5)]
        await waits(gateway, 41)
        engine.open.set()
        await asyncio.gather(*tasks)
        assert 13 <= engine.done[1:21].count("three") <= 17
        assert engine.done[-1] == "late"


async def test_one_that_waits_too_long_is_told_when_to_come_again():
    engine = MemoryTransport(fails(Unavailable("the queue is full", retry_after_ms=2500)))
    async with gate(engine, Settings(limits=Limits(queue_wait_s=0.2))) as gateway:
        for stream in (False, True):
            response = await gateway.chat(stream=stream)
            assert response.status_code == 503
            assert response.headers["retry-after-ms"] == "2500"
            error = response.json()["error"]
            assert error["code"] == "overloaded" and "queue is full" in error["message"]
        assert gateway.pool.lines.waiting() == 0


async def test_the_wait_is_foretold_from_the_pace_and_the_length():
    engine = Narrow(1, takes_s=0.1)
    engine.open.set()
    async with gate(MemoryTransport(engine), Settings(limits=Limits(queue_wait_s=1.0))) as gateway:
        tasks = [ask(gateway, str(number), {}) for number in range(40)]
        refused = [response for response in await asyncio.gather(*tasks) if response.status_code == 503]
        assert refused
        # Of the first that is sent away some thirty wait, for a tenth of a second each.
        assert 1000 < max(int(response.headers["retry-after-ms"]) for response in refused) < 20_000


async def test_hours_without_a_line_are_no_pace():
    engine = Narrow(1)
    engine.open.set()
    async with gate(MemoryTransport(engine), Settings(limits=Limits(queue_wait_s=0.3))) as gateway:
        await asyncio.gather(*(ask(gateway, "x", {}) for _ in range(4)))
        line = gateway.pool.lines.of("demo")
        assert line is not None and line._last_end > 0
        line._last_end -= 3600
        await asyncio.gather(*(ask(gateway, "x", {}) for _ in range(4)))
        engine.open.clear()
        responses = [ask(gateway, "x", {}), ask(gateway, "x", {})]
        done, _ = await asyncio.wait(responses, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = done
        assert int(refused.result().headers["retry-after-ms"]) < 60_000
        engine.open.set()
        await asyncio.gather(*responses)


async def test_a_line_that_is_full_sends_away_the_greediest(tmp_path: Path):
    headers, settings = keyed(tmp_path, Limits(queue_wait_s=30, queued=10), greedy=1, modest=1)
    engine = Narrow(1, takes_s=0.05)
    async with gate(MemoryTransport(engine), settings) as gateway:
        greedy = [ask(gateway, "greedy", headers["greedy"]) for _ in range(30)]
        await waits(gateway, 10)
        modest = [ask(gateway, "modest", headers["modest"]) for _ in range(3)]
        await asyncio.wait(greedy, return_when=asyncio.FIRST_COMPLETED)  # sent away for the modest one
        while gateway.pool.lines.made_for("demo")._queue.count("modest") < 3:
            await asyncio.sleep(0.002)
        engine.open.set()
        assert [response.status_code for response in await asyncio.gather(*modest)] == [200] * 3
        found = Counter(response.status_code for response in await asyncio.gather(*greedy))
        assert found == {200: 8, 503: 22}  # one ran, ten waited, three of which made room


async def test_one_that_leaves_while_it_waits_leaves_nothing():
    engine = Narrow(1)
    async with gate(MemoryTransport(engine), Settings(limits=Limits(queue_wait_s=30))) as gateway:
        first = ask(gateway, "first", {})
        while not engine.running:
            await asyncio.sleep(0.002)
        leaving = [ask(gateway, "leaving", {}, stream=bool(number % 2)) for number in range(6)]
        await waits(gateway, 6)
        last = ask(gateway, "last", {})
        await waits(gateway, 7)
        for task in leaving:
            task.cancel()
        while gateway.pool.lines.waiting() > 1:
            await asyncio.sleep(0.002)
        engine.open.set()
        await asyncio.gather(first, last)
        assert engine.done == ["first", "last"]
        assert gateway.pool.lines.waiting() == 0


async def test_refusals_of_other_kinds_and_a_wait_of_zero_are_told_at_once():
    engine = MemoryTransport(fails(Unavailable("the engine is starting", retry_after_ms=500)))
    async with gate(engine, Settings(limits=Limits(queue_wait_s=30))) as gateway:
        assert (await gateway.chat()).status_code == 503
        assert len(engine.asked) == 1
    engine = MemoryTransport(fails(FULL))
    async with gate(engine, Settings(limits=Limits(queue_wait_s=0))) as gateway:
        assert (await gateway.chat()).headers["retry-after-ms"] == "900"
        assert len(engine.asked) == 1


async def test_without_overload_nothing_of_it_exists():
    engine = Narrow(50)
    engine.open.set()
    async with gate(MemoryTransport(engine), Settings()) as gateway:
        tasks = [ask(gateway, "x", {}) for _ in range(20)]
        assert {response.status_code for response in await asyncio.gather(*tasks)} == {200}
        assert gateway.pool.lines.of("demo") is None


async def test_figures_tell_who_waits():
    engine = Narrow(1)
    async with gate(MemoryTransport(engine), Settings()) as gateway:
        tasks = [ask(gateway, "x", {}) for _ in range(3)]
        await waits(gateway, 2)
        assert "flashserve_gateway:requests_waiting 2.0" in (await gateway.http.get("/metrics")).text
        engine.open.set()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("weight", [0, -1, 1.5, "2", True, 1001])
def test_weights_that_are_none(tmp_path: Path, weight: object):
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{**new_key("alice")[1], "weight": weight}]))
    with pytest.raises(KeysFileError, match=r"entry 0: weight must be an integer in \[1, 1000\]"):
        read_keys(path)
