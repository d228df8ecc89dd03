"""Which of several servers gets a request: rules that hold whatever the loads are, and servers that follow them."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve_client import ConnectionFailed, Unavailable
from flashserve_gateway.command import main
from flashserve_gateway.gauges import Gauges, parse_gauges
from flashserve_gateway.routing import Beginnings, Candidate, beginnings, order
from flashserve_gateway.settings import Settings
from gateway_peers import Gate, MemoryTransport, endless, fails, gate, says

LOADS = st.integers(0, 100)
CANDIDATES = st.lists(st.tuples(LOADS, st.floats(0, 1)), min_size=1, max_size=6).map(
    lambda found: [Candidate(server, load, usage) for server, (load, usage) in enumerate(found)]
)
LENGTHS = st.dictionaries(st.integers(0, 8), st.integers(1, 50))  # also of servers that are gone


# --- the order ---------------------------------------------------------------------------------------------------


@given(CANDIDATES, LENGTHS, st.integers(0, 1000))
def test_all_that_are_alive_and_nobody_else_are_tried_once(candidates, lengths, seed):
    found = order(candidates, lengths, random.Random(seed))
    assert sorted(found) == [candidate.server for candidate in candidates]


@given(CANDIDATES, LENGTHS, st.integers(0, 1000))
def test_the_first_is_within_the_bound_and_has_the_longest_beginning_there(candidates, lengths, seed):
    first = candidates[order(candidates, lengths, random.Random(seed))[0]]
    least = min(candidate.load for candidate in candidates)
    near = [candidate for candidate in candidates if candidate.load <= max(least + 4, 1.5 * least)]
    assert first in near
    roomy = [candidate for candidate in near if candidate.kv_usage < 0.9]
    if roomy:
        assert first in roomy
        best = max(lengths.get(candidate.server, 0) for candidate in roomy)
        assert lengths.get(first.server, 0) == best
        assert first.load == min(item.load for item in roomy if lengths.get(item.server, 0) == best)


def test_of_equals_any():
    candidates = [Candidate(server, 3) for server in range(3)]
    rng = random.Random(1)
    assert min(Counter(order(candidates, {}, rng)[0] for _ in range(300)).values()) > 60
    assert order([], {0: 5}, rng) == []


# --- hashes ------------------------------------------------------------------------------------------------------


def test_hashes_are_the_same_in_every_process():
    program = "from flashserve_gateway.routing import beginnings; print(beginnings(['m', None], 'x' * 1000))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path = {sys.path!r}; {program}"], capture_output=True, text=True
    )
    assert done.stdout.strip() == str(beginnings(["m", None], "x" * 1000)), done.stderr
    assert len(beginnings(["m", None], "x" * 1000)) == 3


@given(st.text(max_size=3000), st.text(max_size=3000), st.text(max_size=1500))
def test_prompts_share_hashes_as_far_as_they_share_text(common, one, other):
    ours, theirs = (beginnings("m", common + rest) for rest in (one, other))
    shared = 0
    while shared < min(len(ours), len(theirs)) and ours[shared] == theirs[shared]:
        shared += 1
    assert shared >= len(common.encode()) // 256
    assert not set(ours[shared:]) & set(theirs[shared:])
    assert not set(ours) & set(beginnings("another model", common + one))


def test_a_conversation_goes_on_from_its_last_turn():
    turn = [{"role": "user", "content": "why " * 100}, {"role": "assistant", "content": "so " * 100}]
    before, after = beginnings("m", turn), beginnings("m", [*turn, {"role": "user", "content": "and " * 100}])
    assert before == after[: len(before)] and len(after) > len(before)
    ids = beginnings("m", list(range(1000)))
    assert ids == beginnings("m", list(range(2000)))[: len(ids)] and ids


def test_a_prompt_of_any_length_is_a_bounded_number_of_hashes():
    for prompt in ("x" * 10_000_000, [5] * 1_000_000, [{"role": "user", "content": "x" * 1_000_000}] * 3):
        assert len(beginnings("m", prompt)) == 512
    assert beginnings("m", "\ud800" * 1000)
    assert beginnings("m", "") == beginnings("m", "short") == []


# --- the table ---------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.lists(st.integers(0, 60), max_size=12), st.integers(0, 3)), max_size=60))
def test_the_table_is_bounded(prompts):
    table = Beginnings(capacity=16)
    for hashes, server in prompts:
        table.add(hashes, server)
        assert len(table) <= 16
        if len(set(hashes)) == len(hashes):
            assert table.lengths(hashes).get(server, 0) == len(hashes)
    table.forget(0)
    assert all(0 not in table.lengths([value]) for value in range(61))


def test_a_beginning_counts_from_its_first_piece_and_for_a_while():
    now = 0.0
    table = Beginnings(lifetime_s=10, clock=lambda: now)
    table.add([1, 2, 3], 0)
    table.add([1, 2], 1)
    assert table.lengths([1, 2, 3, 4]) == {0: 3, 1: 2}
    assert table.lengths([9, 2, 3]) == {}
    now = 8.0
    table.add([1], 1)
    now = 12.0
    assert table.lengths([1, 2, 3]) == {1: 1}


# --- gauges ------------------------------------------------------------------------------------------------------

METRICS = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="1",model="a",model_name="a",version="1"} 3
vllm:num_requests_running{engine="2",model="a",model_name="a",version="1"} 2
vllm:num_requests_waiting{engine="1",model="a",model_name="a",version="1"} 4
vllm:kv_cache_usage_perc{engine="1",model="a",model_name="a",version="1"} 0.5
flashserve:engine_ready{engine="1",model="a",model_name="a",version="1"} 1
flashserve:engine_ready{engine="1",model="b",model_name="b",version="1"} 0
flashserve:engine_ready{engine="1",model="c",model_name="c",version="1"} 1
flashserve:engine_stalled{engine="1",model="c",model_name="c",version="1"} 1
nv_inference_count{model="a",version="1"} 7
"""


def test_gauges_are_summed_over_engines():
    assert parse_gauges(METRICS) == {
        "a": Gauges(9, 0.5, True), "b": Gauges(0, 0.0, False), "c": Gauges(0, 0.0, False),
    }  # fmt: skip
    assert parse_gauges("") == {}


# --- servers -----------------------------------------------------------------------------------------------------


def conversation(number: int, turns: int = 1) -> dict[str, Any]:
    words = [f"{number}: " + "tell me more " * 50, "of course " * 50]
    return {"messages": [{"role": "user", "content": text} for text in words * turns]}


async def test_conversations_stay_where_they_began():
    servers = [MemoryTransport(), MemoryTransport(), MemoryTransport()]
    async with gate(servers[0], others=tuple(servers[1:])) as gateway:
        for turns in range(1, 5):
            for number in range(12):
                assert (await gateway.chat(**conversation(number, turns))).status_code == 200
        homes = [{str(asked.chat["messages"][0]["content"])[:3] for asked in server.asked} for server in servers]
        assert sum(map(len, homes)) == 12  # nobody moved
        assert sum(map(bool, homes)) > 1


async def test_other_salts_models_and_tools_share_nothing():
    one, other = MemoryTransport(), MemoryTransport()
    async with gate(one, others=(other,)) as gateway:
        await gateway.chat(**conversation(1), cache_salt="a")
        home, away = (0, 1) if one.asked else (1, 0)
        gateway.pool.servers[home].in_flight = 1
        await gateway.chat(**conversation(1), cache_salt="a")
        assert len((one, other)[away].asked) == 0
        await gateway.chat(**conversation(1), cache_salt="b")
        assert len((one, other)[away].asked) == 1


async def test_a_beginning_does_not_overload_its_server():
    one, other = MemoryTransport(endless), MemoryTransport(endless)
    async with gate(one, others=(other,)) as gateway:
        tasks = []
        for count in range(1, 31):
            tasks.append(asyncio.create_task(gateway.chat(**conversation(1), stream=True)))
            while len(one.asked) + len(other.asked) < count:
                await asyncio.sleep(0.002)
            loads = sorted((len(one.asked), len(other.asked)))
            assert loads[1] <= max(loads[0] + 4, 1.5 * loads[0]) + 1
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_dead_server_is_never_asked_and_its_cache_is_forgotten():
    servers = [MemoryTransport(), MemoryTransport()]
    async with gate(servers[0], Settings(refresh_s=0.02), others=(servers[1],)) as gateway:
        await gateway.chat(**conversation(1))
        home = 0 if servers[0].asked else 1
        servers[home].index_error = ConnectionFailed("gone")
        await state(gateway, home, alive=False)
        for _ in range(5):
            await gateway.chat(**conversation(1))
        assert (len(servers[home].asked), len(servers[1 - home].asked)) == (1, 5)
        servers[home].index_error = None
        await state(gateway, home, alive=True)
        await gateway.chat(**conversation(1))
        assert len(servers[home].asked) == 1


async def state(gateway: Gate, number: int, alive: bool) -> None:
    while bool(gateway.pool.servers[number].error) == alive:
        await asyncio.sleep(0.005)


async def test_what_the_engines_say_of_themselves_counts():
    one, other = MemoryTransport(), MemoryTransport()
    async with gate(one, Settings(refresh_s=60), others=(other,)) as gateway:
        first, second = gateway.pool.servers
        first.gauges = {"demo": Gauges(is_healthy=False)}
        await asyncio.gather(*(gateway.chat() for _ in range(5)))
        assert (len(one.asked), len(other.asked)) == (0, 5)
        second.gauges = {"demo": Gauges(is_healthy=False)}  # both: the engines themselves must say so
        assert (await gateway.chat()).status_code == 200
        first.gauges = second.gauges = {}
        first.others = 100
        await asyncio.gather(*(gateway.chat() for _ in range(20)))
        assert len(one.asked) + len(other.asked) == 26 and len(one.asked) <= 1
        one.asked.clear()
        first.others = 0
        second.gauges = {"demo": Gauges(kv_usage=0.95)}
        await gateway.chat(**conversation(3))
        assert len(one.asked) == 1


async def test_a_full_server_is_left_for_another_at_once():
    full, free = MemoryTransport(fails(Unavailable("the queue is full", retry_after_ms=9000))), MemoryTransport()
    async with gate(full, others=(free,)) as gateway:
        gateway.pool.servers[1].in_flight = 1
        assert (await gateway.chat()).status_code == 200
        assert (len(full.asked), len(free.asked)) == (1, 1)


async def test_with_one_server_nothing_is_hashed():
    async with gate(MemoryTransport(says("a"))) as gateway:
        await gateway.chat(**conversation(1))
        assert len(gateway.pool._beginnings) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--triton", "a:1", "--triton", "b:1", "--triton-metrics", "a:2"], "2 --triton and 1 --triton-metrics"),
        (["--triton-metrics", "a:2", "--triton-metrics", "b:2"], "1 --triton and 2 --triton-metrics"),
    ],
)
def test_metrics_belong_to_servers(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main([*arguments, "--check"]) == 1
    assert words in capsys.readouterr().err
    assert main(["--triton", "a:1", "--triton-metrics", "a:2", "--queue-wait", "0", "--check"]) == 0
    with pytest.raises(SystemExit):
        main(["--queue-wait", "-1"])
    assert "seconds, 0 or more" in capsys.readouterr().err


async def test_what_others_send_to_a_server_is_read_from_its_metrics():
    """Of nine requests that it says it has, one is ours."""

    async def metrics(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = METRICS.encode()
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    listener = await asyncio.start_server(metrics, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    busy, free = MemoryTransport(names=("a",)), MemoryTransport(names=("a",))
    settings = Settings(refresh_s=0.02, triton_metrics=(address, "127.0.0.1:1"))
    async with gate(busy, settings, others=(free,)) as gateway:
        first = gateway.pool.servers[0]
        first.in_flight = 1
        while first.others != 8:
            await asyncio.sleep(0.005)
        first.in_flight = 0
        for _ in range(6):
            assert (await gateway.chat(model="a")).status_code == 200
        assert (len(busy.asked), len(free.asked)) == (0, 6)
    listener.close()
