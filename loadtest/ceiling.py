"""How much load one process can make: `python -m loadtest.ceiling`, against servers that do nothing but answer.

Each protocol twice: with answers that come at once, whole, and with answers of a token every 20 ms. The servers run in
a process of their own.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

TOKENS = 64
PACED_MS = 20.0
INSTANT_USERS = 32
SECONDS = 8
# Where a tenth of gaps of 20 ms is seen as more than this, the process no longer keeps up with its streams.
BLURRED_S = 0.030
PACED_USERS = (50, 100, 200, 400, 800)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(event: bytes) -> bytes:
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def _http_answer(protocol: str) -> tuple[bytes, bytes]:
    """A token's chunk, and the answer's end."""
    if protocol == "openai":
        usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 32, "completion_tokens": TOKENS}}).encode()
        token = _chunk(b'{"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":"a"}}]}')
        return token, _chunk(usage) + _chunk(b"[DONE]") + b"0\r\n\r\n"
    token = _chunk(b'{"model_name":"demo","num_input_tokens":32,"num_output_tokens":1,"text_output":"a"}')
    return token, b"0\r\n\r\n"


async def _serve_http(protocol: str, gap_s: float, ready: Any) -> None:
    token, end = _http_answer(protocol)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0]))
                if gap_s:
                    writer.write(_HEAD + token)
                    for _ in range(TOKENS - 1):
                        await asyncio.sleep(gap_s)
                        writer.write(token)
                    writer.write(end)
                else:
                    writer.write(_HEAD + token * TOKENS + end)
                await writer.drain()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    path = "/v1" if protocol == "openai" else ""
    ready.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}")
    await server.serve_forever()


async def _serve_grpc(gap_s: float, ready: Any) -> None:
    response = service_pb2.ModelInferResponse(model_name="demo")
    raw = {"text_output": b"\x01\0\0\0a", "num_output_tokens": b"\x01\0\0\0", "num_input_tokens": b"\x20\0\0\0"}
    for name, content in raw.items():
        response.outputs.add(name=name, datatype="BYTES" if name == "text_output" else "UINT32", shape=(1,))
        response.raw_output_contents.append(content)
    token = service_pb2.ModelStreamInferResponse(infer_response=response).SerializeToString()

    async def answer(request: bytes, context: Any) -> Any:
        for index in range(TOKENS):
            if gap_s and index:
                await asyncio.sleep(gap_s)
            yield token

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(answer)  # bytes in, bytes out
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler("inference.GRPCInferenceService", {"ModelStreamInfer": handler})]
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    ready.send(f"grpc://127.0.0.1:{port}")
    await server.wait_for_termination()


def _serve(protocol: str, gap_s: float, ready: Any) -> None:
    asyncio.run(_serve_grpc(gap_s, ready) if protocol == "triton-grpc" else _serve_http(protocol, gap_s, ready))


@contextlib.contextmanager
def serving(protocol: str, gap_s: float) -> Iterator[str]:
    """Yields the server's URL."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(protocol, gap_s, sender), daemon=True)
    process.start()
    try:
        yield receiver.recv()
    finally:
        process.terminate()
        process.join()


def load(url: str, users: int, processes: int) -> dict[str, Any]:
    """A run of bench; its report, with the cores that it used as ``cores``."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "flashserve.cli", "bench", url, "--model", "demo"]
        words += ["--users", str(users), "--report", folder]
        words += ["--processes", str(processes), "--metrics-url", "none", "--duration", str(SECONDS)]
        words += ["--prompt-tokens", "32", "--output-tokens", str(TOKENS)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        report: dict[str, Any] = json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))
        # With the two seconds of Locust's start and of the report, which is a little more than the load itself took.
        report["cores"] = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / SECONDS
        return report


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.ceiling", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1, help="of the load generator (default: 1)")
    processes = parser.parse_args().processes
    print("| protocol | requests/s, at once | tokens/s, at once | streams, 20 ms per token | tokens/s | gap p90 |")
    print("|---|---|---|---|---|---|", flush=True)
    for protocol in ("triton-http", "openai", "triton-grpc"):
        with serving(protocol, 0.0) as url:
            rates = load(url, INSTANT_USERS, processes)["rates"]
        cells = [f"{rates['answered requests/s']:,.0f}", f"{rates['output tokens/s']:,.0f}"]
        held: list[str] = ["below 50", "-", "-"]
        with serving(protocol, PACED_MS / 1000) as url:
            for users in PACED_USERS:
                report = load(url, users, processes)
                gap = report["phases"]["steady"]["measures"]["itl"]["p90"]
                if gap > BLURRED_S:
                    break
                held = [str(users), f"{report['rates']['output tokens/s']:,.0f}", f"{gap * 1000:.1f} ms"]
        print(f"| {protocol} | {' | '.join([*cells, *held])} |", flush=True)


if __name__ == "__main__":
    main()
