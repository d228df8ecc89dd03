"""Streams through a gateway, and straight to Triton's gRPC."""

from __future__ import annotations

import asyncio
import json
import time

from flashserve_client import AsyncClient

PROMPT = "def fibonacci(n):"


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
