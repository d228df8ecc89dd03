#!/usr/bin/env python3
"""Good requests, people who leave, hostile ones, and faults, all at once; then everything must be as before.

    make chaos                                  two minutes
    make chaos ARGS="--minutes 30 --seed 7"
    make chaos ARGS="--ends 20"                 instead: how streams end with their server, counted in 20 tries

A real tritonserver serves the demo model in float32, with a gateway in front. Each good request's answer is known from
asking for it alone; whatever else happens it must be that answer, or near a fault a typed error, within its bound, and
what came before an error must be the answer's beginning. A third of the clients ask through the gateway. Faults: the
engine killed or stopped, the stub or the gateway killed, the model loaded anew; where redis-server is on PATH the
gateway has a Redis, which is killed too, and whose being away is no excuse for anything. The exit status is 0 if
nothing was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "support")]

from ends import count_ends  # noqa: E402
from faults import Breaker, State, leftovers  # noqa: E402
from through_gateway import GatewayClient  # noqa: E402
from traffic import Client, Good, Tally, ask, good_requests, leave, offend  # noqa: E402

from flashserve.launcher.gateway import STABLE_AFTER_S  # noqa: E402
from flashserve_client import AsyncClient  # noqa: E402
from flashserve_gateway.keys import new_key  # noqa: E402
from flashserve_gateway.store.connection import PREFIX  # noqa: E402
from harness import HTTP, ROOT, Server, wait_until  # noqa: E402
from redis_peer import PROGRAM, RedisPeer, redis_server  # noqa: E402

Answers = dict[Good, tuple[str, str]]

MODEL = "demo"
WEIGHTS = ROOT / "model_repository" / "demo" / "1" / "weights"
CLIENTS, LEAVERS, OFFENDERS = 9, 2, 2
PROTOCOLS = ("grpc", "http", "gateway")
KEY, KEY_ENTRY = new_key("chaos")
CACHED_S = 1.0  # some answers are replayed, and most are not
LEASES_S = 20.0  # places that a killed gateway held
FAULT_EVERY_S = 6.0
SOME_DESCRIPTORS = 8  # of connections that are just being closed
# Triton 2.51 never ends the requests that a killed stub had open, and so keeps its region of shared memory (open and
# mapped: 0.8 MiB), 35 threads with their stacks and the connections of its HTTP streams until it ends itself. A stub
# that is killed idle leaves nothing.
KEPT_REGIONS, KEPT_DESCRIPTORS, KEPT_MEMORY = 1, 1 + CLIENTS // 2, 2 << 20
SETTLE_S = 20.0  # connections whose clients have gone
MEMORY_GROWTH = 0.1
MEMORY_SLACK = 32 << 20  # of a process that began small


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    parser.add_argument(
        "--bound", type=float, default=60.0, help="seconds for any request's end (default: %(default)s)"
    )
    parser.add_argument("--ends", type=int, metavar="TRIES", help="count how streams end with their server")
    parser.add_argument("--log", type=Path, help="where the server's log is put if something was wrong")
    args = parser.parse_args()
    if args.ends:
        return verdict(count_ends(args.ends))
    settings = {"model": str(WEIGHTS), "device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 64 << 20}
    with contextlib.ExitStack() as around:
        peer = around.enter_context(redis_server()) if PROGRAM is not None else None
        keys = around.enter_context(tempfile.NamedTemporaryFile("w", suffix=".json"))
        json.dump([{**KEY_ENTRY, "requests_in_flight": 1000, "tokens_per_minute": 1 << 30}], keys)
        keys.flush()
        options = ["--gateway-keys", keys.name, "--gateway-cache-answers", str(CACHED_S)]
        options += ["--gateway-redis", peer.url] if peer is not None else []
        server = around.enter_context(Server({MODEL: settings}, arguments=options, gateway=True))
        wait_gateway(server)
        problems = asyncio.run(chaos(server, peer, random.Random(args.seed), args.minutes * 60, args.bound))
        if problems and args.log:
            args.log.write_text(server.log)
    return verdict(problems)


def verdict(problems: list[str]) -> int:
    """Say it, and give it as an exit status."""
    print("\n".join(problems) if problems else "nothing was wrong")
    return 1 if problems else 0


async def chaos(
    server: Server, peer: RedisPeer | None, rng: random.Random, seconds: float, bound_s: float
) -> list[str]:
    """Everything that was wrong, in words."""
    known = await answers(server, good_requests(rng, 40))
    before = State.of(server)
    tally = Tally(bound_s)
    breaker = Breaker(server, MODEL, rng, lambda: tally.faults.append(time.monotonic()))
    end = time.monotonic() + seconds
    await asyncio.gather(
        *(asking(server, known, random.Random(rng.random()), end, tally, index) for index in range(CLIENTS)),
        *(leaving(server, known, random.Random(rng.random()), end, tally) for _ in range(LEAVERS)),
        *(offending(server, random.Random(rng.random()), end, tally) for _ in range(OFFENDERS)),
        breaking(breaker, end),
        breaking_gateway(breaker, end),
        *([breaking_redis(breaker, peer, end)] if peer is not None else []),
        progress(tally, end),
    )
    show(tally, breaker)
    problems = tally.wrong[:20]
    if not wait_until(lambda: not leftovers(server, MODEL), 10):
        problems += leftovers(server, MODEL)
    places = f"{PREFIX}places:chaos"
    if peer is not None and not wait_until(
        lambda: not peer.client().zcount(places, time.time() * 1000, "inf"), LEASES_S
    ):
        problems.append(f"Redis still has places: {peer.client().zrange(places, 0, -1, withscores=True)}")
    again = await answers(server, list(known)[:5])
    problems += [f"after it all: {good}" for good, answer in again.items() if answer != known[good]]
    wait_until(lambda: State.of(server).descriptors <= before.descriptors + SOME_DESCRIPTORS, SETTLE_S, poll_s=0.5)
    return problems + growth(before, State.of(server), len(breaker.recovery_s.get("kill_stub", ())))


def wait_gateway(server: Server) -> None:
    """The launcher does not wait for it."""

    def is_ready() -> bool:
        try:
            return HTTP.get(f"{server.gateway}/ready", timeout=10).status_code == 200
        except httpx.TransportError:
            return False

    assert wait_until(is_ready, 30), server.log[-4000:]


async def answers(server: Server, requests: list[Good]) -> Answers:
    """What each gives when it is alone."""
    async with client(server, "grpc", 60.0) as one:
        return {good: await good.send(one, stream=False) for good in requests}


def client(server: Server, protocol: str, timeout_s: float) -> Client:
    if protocol == "gateway":
        return GatewayClient(server.gateway, MODEL, timeout_s, KEY)
    url = f"grpc://{server.grpc}" if protocol == "grpc" else server.http
    return AsyncClient(url, model=MODEL, timeout_s=timeout_s)


async def asking(server: Server, known: Answers, rng: random.Random, end: float, tally: Tally, index: int) -> None:
    async with client(server, PROTOCOLS[index % len(PROTOCOLS)], tally.bound_s) as one:
        while time.monotonic() < end:
            good = rng.choice(list(known))
            if not await ask(good, known[good], one, rng.random() < 0.7, tally):
                await asyncio.sleep(rng.uniform(0.1, 0.5))  # as the error asks for


async def leaving(server: Server, known: Answers, rng: random.Random, end: float, tally: Tally) -> None:
    async with client(server, rng.choice(PROTOCOLS), tally.bound_s) as one:
        while time.monotonic() < end:
            await leave(rng.choice(list(known)), one, rng, tally)


async def offending(server: Server, rng: random.Random, end: float, tally: Tally) -> None:
    while time.monotonic() < end:
        await offend(f"{server.http}/v2/models/{MODEL}", rng, tally)
        await asyncio.sleep(rng.random() * 0.2)


async def breaking(breaker: Breaker, end: float) -> None:
    while time.monotonic() < end - FAULT_EVERY_S:
        await asyncio.sleep(breaker.rng.random() * FAULT_EVERY_S)
        await breaker.break_something()


async def breaking_gateway(breaker: Breaker, end: float) -> None:
    wait_s = FAULT_EVERY_S * breaker.rng.random()
    while time.monotonic() + wait_s < end - FAULT_EVERY_S:
        await asyncio.sleep(wait_s)
        await breaker.break_gateway()
        wait_s = STABLE_AFTER_S * breaker.rng.uniform(1, 2)  # sooner, the launcher would take ever longer each time


async def breaking_redis(breaker: Breaker, peer: RedisPeer, end: float) -> None:
    while time.monotonic() < end - FAULT_EVERY_S:
        await asyncio.sleep(breaker.rng.random() * FAULT_EVERY_S)
        await breaker.break_redis(peer)


async def progress(tally: Tally, end: float) -> None:
    while (left := end - time.monotonic()) > 0:
        await asyncio.sleep(min(left, 15))
        print(f"{max(0, end - time.monotonic()):5.0f} s left: {dict(tally.counts)}", flush=True)


def show(tally: Tally, breaker: Breaker) -> None:
    for name, count in sorted(tally.counts.items()):
        print(f"{count:7}  {name}")
    print(f"{breaker.redis_kills:7}  Redis killed")
    for name, seconds in sorted(breaker.recovery_s.items()):
        worst, median = max(seconds), statistics.median(seconds)
        print(f"{len(seconds):7}  {name}: answers again after {median:.1f} s (median), {worst:.1f} s (worst)")


def growth(before: State, after: State, killed_stubs: int) -> list[str]:
    """What is more than before, and more than what Triton keeps of a stub that was killed."""
    found = []
    kept = {"processes": 0, "descriptors": SOME_DESCRIPTORS + killed_stubs * KEPT_DESCRIPTORS,
            "shared_memory": killed_stubs * KEPT_REGIONS}  # fmt: skip
    for name, allowed in kept.items():
        old, new = getattr(before, name), getattr(after, name)
        print(f"{old:5} {name} before, {new} after")
        if new > old + allowed:
            found.append(f"{name}: {old} before, {new} after, {allowed} more are explained")
    for kind, old in before.memory.items():
        new = after.memory.get(kind, 0)
        print(f"{old >> 20:5} MiB of {kind} before, {new >> 20} after")
        explained = killed_stubs * KEPT_MEMORY if kind == "tritonserver" else 0
        if new > old * (1 + MEMORY_GROWTH) + MEMORY_SLACK + explained:
            found.append(f"memory of {kind}: {old >> 20} MiB before, {new >> 20} after, {explained >> 20} explained")
    return found


if __name__ == "__main__":
    sys.exit(main())
