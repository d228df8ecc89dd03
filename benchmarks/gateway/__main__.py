"""What does the gateway cost? The same streams straight to Triton's gRPC and through it, in turn; and on its own.

    python -m benchmarks.gateway            with the demo model
    python -m benchmarks.gateway --rounds 9 --model-repository DIR --model NAME

The share of straight gRPC's tokens per second that 32 streams keep through the gateway; the processor time of a token
in the gateway and in a gRPC client, which depends less on what else the machine does; what the gateway adds to the time
to the first token, one request at a time; and the chunks per second of one gateway process in front of an engine that
costs nothing, with the memory that 10,000 requests leave there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.machine import describe_machine
from benchmarks.common.results import Spread, cpu_result, result_folder, rounded, write_json
from benchmarks.common.serving import free_ports
from benchmarks.gateway.loads import PROMPT, load_gateway, load_grpc, read_stream
from flashserve_client import AsyncClient

READY_TIMEOUT_S = 120.0
MEMORY_PARTS = 5


async def first_token(client: AsyncClient, port: int, model: str) -> tuple[float, float]:
    """Milliseconds to the first token of one request, straight and through."""
    stream = client.stream(PROMPT, max_tokens=2, temperature=0, ignore_eos=True)
    async for _ in stream:
        pass
    assert stream.result.ttft_s is not None
    body: dict[str, object] = {"model": model, "prompt": PROMPT, "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    _, first_s = await read_stream(port, body)
    return stream.result.ttft_s * 1000, first_s * 1000


def cpu_s(process: psutil.Process) -> float:
    """Processor time so far, in seconds."""
    return float(sum(process.cpu_times()[:2]))


async def compare(port: int, grpc_port: int, gateway: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both ways, in turn."""
    client_process, tokens = psutil.Process(), arguments.streams * arguments.tokens
    async with AsyncClient(f"grpc://127.0.0.1:{grpc_port}", model=arguments.model) as client:
        shares, client_us, gateway_us = [], [], []
        for number in range(arguments.rounds + 1):
            used = cpu_s(client_process)
            straight = await load_grpc(client, arguments.streams, arguments.tokens)
            of_client, used = cpu_s(client_process) - used, cpu_s(gateway)
            through = await load_gateway(port, arguments.model, arguments.streams, arguments.tokens)
            of_gateway = cpu_s(gateway) - used
            if number:  # the first warms both up
                shares.append(100 * through / straight)
                client_us.append(of_client / tokens * 1e6)
                gateway_us.append(of_gateway / tokens * 1e6)
                print(f"  {straight:8.0f} straight  {through:8.0f} through  {through / straight:6.1%}", flush=True)
        added = []
        for _ in range(arguments.first_tokens):
            straight_ms, through_ms = await first_token(client, port, arguments.model)
            added.append(through_ms - straight_ms)
    say(f"of straight gRPC's tokens/s that {arguments.streams} streams keep, %", shares, 1)
    say("of processor time of a token in the gateway, µs", gateway_us)
    say("of processor time of a token in a gRPC client, µs", client_us)
    say("added to the first token, ms", added, 2)
    return {
        "share_of_grpc_percent": shares,
        "gateway_us_per_token": gateway_us,
        "grpc_client_us_per_token": client_us,
        "added_first_token_ms": statistics.median(added),
    }


async def measure_alone(port: int, process: psutil.Process, arguments: argparse.Namespace) -> dict[str, Any]:
    """Chunks per second, what one costs, and the memory that requests leave."""
    await load_gateway(port, "free", arguments.streams, 100)
    rates, costs = [], []
    for _ in range(arguments.rounds):
        used = cpu_s(process)
        rates.append(await load_gateway(port, "free", arguments.streams, arguments.free_tokens))
        costs.append(1e6 * (cpu_s(process) - used) / (arguments.streams * arguments.free_tokens))
    memory_mib = [process.memory_info().rss / 2**20]
    for _ in range(MEMORY_PARTS):
        for _ in range(arguments.requests // MEMORY_PARTS // arguments.streams):
            await load_gateway(port, "free", arguments.streams, 4)
        memory_mib.append(process.memory_info().rss / 2**20)
    say("chunks/s of a gateway alone (its reader shares the machine)", rates)
    say("of processor time of a chunk, µs", costs)
    print(f"MiB, before and along {arguments.requests:,} requests: {', '.join(f'{mib:.0f}' for mib in memory_mib)}")
    return {"chunks_per_s": rates, "us_per_chunk": costs, "requests": arguments.requests, "memory_mib": memory_mib}


def say(what: str, values: Sequence[float], digits: int = 0) -> None:
    """A line with median, lowest and highest."""
    spread = Spread.of(values)
    if spread is not None:
        print(f"{spread.text(digits):>24} {what}", flush=True)


@contextlib.contextmanager
def serving(arguments: argparse.Namespace) -> Iterator[tuple[int, int, psutil.Process]]:
    """A server with its gateway: the gateway's port, gRPC's, and the gateway's process."""
    http, grpc, metrics, gateway = free_ports(4)
    command = [sys.executable, "-m", "flashserve.cli", "serve", "--http-port", str(http), "--grpc-port", str(grpc)]
    command += ["--metrics-port", str(metrics), "--gateway-port", str(gateway)]
    if arguments.model_repository:
        command += ["--model-repository", arguments.model_repository]
    command += ["--", f"--load-model={arguments.model}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_ready(gateway, process)
        family = psutil.Process(process.pid).children(recursive=True)
        yield gateway, grpc, next(child for child in family if "flashserve_gateway" in child.cmdline())
    finally:
        process.terminate()
        process.wait(15)


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the gateway says so."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10):
            return
        time.sleep(0.5)
    raise SystemExit("the server did not become ready: flashserve doctor says what is missing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-repository", metavar="DIR", help="default: the source checkout's")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="of each stream (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first-tokens", type=int, default=100, metavar="N", help="pairs of single requests")
    parser.add_argument("--free-tokens", type=int, default=1000, help="of each stream of the free engine")
    parser.add_argument("--requests", type=int, default=10_000, help="for the memory that they leave")
    parser.add_argument("--out", type=Path, default=result_folder("gateway"), help="results (default: %(default)s)")
    arguments = parser.parse_args()
    machine = describe_machine()
    command = [sys.executable, "-m", "benchmarks.gateway.free_engine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as alone:
        assert alone.stdout is not None
        port = int(alone.stdout.readline())
        figures = asyncio.run(measure_alone(port, psutil.Process(alone.pid), arguments))
        alone.terminate()
    with serving(arguments) as (port, grpc_port, gateway):
        figures |= asyncio.run(compare(port, grpc_port, gateway, arguments))
    path = cpu_result(arguments.out, machine, arguments.model)
    write_json(path, {"machine": machine, "streams": arguments.streams, **rounded(figures)})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
