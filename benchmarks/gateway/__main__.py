"""What does the gateway cost? The same streams straight to Triton's gRPC and through it, in turn; and on its own.

    python -m benchmarks.gateway            with the demo model
    python -m benchmarks.gateway --rounds 9 --model-repository DIR --model NAME

The share of straight gRPC's tokens per second that 32 streams keep through the gateway; the processor time of a token
in the gateway and in a gRPC client, which depends less on what else the machine does; what the gateway adds to the time
to the first token, one request at a time; and the chunks per second of one gateway process in front of an engine that
costs nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator

import psutil

from benchmarks.common.serving import free_ports
from flashserve_client import AsyncClient

PROMPT = "def fibonacci(n):"
READY_TIMEOUT_S = 120.0


async def read_stream(port: int, body: dict[str, object]) -> tuple[int, float]:
    """Reads one streamed completion: its chunks with text, and the seconds until the first."""
    content = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    started = time.perf_counter()
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(content) + content
    )
    count, first_s, rest = 0, 0.0, b""
    while piece := await reader.read(1 << 16):
        rest = rest[-16:] + piece
        found = piece.count(b'"text":')
        if found and not count:
            first_s = time.perf_counter() - started
        count += found
    writer.close()
    if b"[DONE]" not in rest:
        raise SystemExit(f"a stream did not end as it should: {rest!r}")
    return count, first_s


async def load_gateway(port: int, model: str, streams: int, tokens: int) -> float:
    """Tokens per second of `streams` streams at once, through the gateway."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    await asyncio.gather(*(read_stream(port, body) for _ in range(streams)))
    return streams * tokens / (time.perf_counter() - started)


async def load_grpc(client: AsyncClient, streams: int, tokens: int) -> float:
    """The same, straight."""

    async def one() -> None:
        async for _ in client.stream(PROMPT, max_tokens=tokens, temperature=0, ignore_eos=True):
            pass

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(streams)))
    return streams * tokens / (time.perf_counter() - started)


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


async def compare(port: int, grpc_port: int, gateway: psutil.Process, arguments: argparse.Namespace) -> None:
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
                shares.append(through / straight)
                client_us.append(of_client / tokens * 1e6)
                gateway_us.append(of_gateway / tokens * 1e6)
                print(f"  {straight:8.0f} straight  {through:8.0f} through  {through / straight:6.1%}", flush=True)
        added = []
        for _ in range(arguments.first_tokens):
            straight_ms, through_ms = await first_token(client, port, arguments.model)
            added.append(through_ms - straight_ms)
    print(f"{arguments.streams} streams keep {statistics.median(shares):.1%} of straight gRPC's tokens/s "
          f"({min(shares):.1%} to {max(shares):.1%}, {arguments.rounds} rounds in turn)")  # fmt: skip
    spread = f"{statistics.median(gateway_us):.0f} µs ({min(gateway_us):.0f} to {max(gateway_us):.0f})"
    of_clients = f"{statistics.median(client_us):.0f} µs ({min(client_us):.0f} to {max(client_us):.0f})"
    print(f"a token takes {spread} of processor time in the gateway, {of_clients} in a gRPC client")
    print(f"first token: {statistics.median(added):+.1f} ms at the median of {len(added)} pairs")


async def measure_alone(port: int, process: psutil.Process, arguments: argparse.Namespace) -> None:
    """Chunks per second, and what one costs."""
    await load_gateway(port, "free", arguments.streams, 100)
    rates, costs = [], []
    for _ in range(arguments.rounds):
        used = cpu_s(process)
        rates.append(await load_gateway(port, "free", arguments.streams, arguments.free_tokens))
        costs.append((cpu_s(process) - used) / (arguments.streams * arguments.free_tokens))
    print(f"alone: {statistics.median(rates):,.0f} chunks/s (its reader shares the machine), "
          f"{statistics.median(costs) * 1e6:.0f} µs of processor time each, "
          f"{process.memory_info().rss / 2**20:.0f} MiB")  # fmt: skip


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
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "benchmarks.gateway.free_engine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as alone:
        assert alone.stdout is not None
        port = int(alone.stdout.readline())
        asyncio.run(measure_alone(port, psutil.Process(alone.pid), arguments))
        alone.terminate()
    with serving(arguments) as (port, grpc_port, gateway):
        asyncio.run(compare(port, grpc_port, gateway, arguments))


if __name__ == "__main__":
    main()
