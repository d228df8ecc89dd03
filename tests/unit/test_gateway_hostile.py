"""Eight good streams beside everything that a hostile client can do at once: nothing of it reaches them, or the log."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import socket
from collections.abc import Awaitable, Callable

import httpx
import psutil
import pytest

from flashserve_gateway.settings import Limits, Settings
from gateway_peers import CHAT, Gate, MemoryTransport, gate, piece

PATH = "/v1/chat/completions"
STREAMED = json.dumps({**CHAT, "stream": True}).encode()
MB = 1 << 20
# A busy machine may hold up good requests for some tenths of a second, too.
LIMITS = Limits(body_timeout_s=1.0, header_timeout_s=1.0, slow_reader_timeout_s=0.3)
Attack = Callable[[Gate], Awaitable[None]]


def head(*lines: str, path: str = PATH) -> bytes:
    fixed = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json")
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


async def connect(gateway: Gate, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = httpx.URL(gateway.url)
    return await asyncio.open_connection(address.host, address.port, limit=limit)


async def status_of(gateway: Gate, *sent: bytes, every_s: float = 0.0) -> int:
    """That of the answer to raw bytes, of which no more are sent once it is there; 0 if the connection was reset, which
    TCP does to one that goes on sending to who has closed, and which may overtake the answer."""
    reader, writer = await connect(gateway)
    answer = asyncio.create_task(reader.readline())
    for data in sent:
        if answer.done():
            break
        writer.write(data)
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        await asyncio.sleep(every_s)
    try:
        return int((await answer).split()[1])
    except ConnectionError:
        return 0
    finally:
        writer.close()


async def post(gateway: Gate, content: bytes, **headers: str) -> int:
    kind = {"content-type": "application/json", **headers}
    return (await gateway.http.post(PATH, content=content, headers=kind)).status_code


# --- what is done ------------------------------------------------------------------------------------------------


async def deep_nesting(gateway: Gate) -> None:
    for body in (b"[" * MB, b'{"a":' * 100_000, b'{"model": "demo", "tools": ' + b"[" * 900 + b"]" * 900 + b"}"):
        assert await post(gateway, body) == 400


async def a_hundred_megabytes_announced(gateway: Gate) -> None:
    assert await status_of(gateway, head(f"Content-Length: {100 * MB}"), b" " * MB) == 413


async def a_hundred_megabytes_in_pieces(gateway: Gate) -> None:
    chunk = b"%x\r\n%s\r\n" % (MB, b" " * MB)
    status = await status_of(gateway, head("Transfer-Encoding: chunked"), *[chunk] * 100)
    assert status in (0, 408, 413)  # whichever of its limits it comes to first


async def bad_utf8(gateway: Gate) -> None:
    for text in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\ud800"):
        assert await post(gateway, b'{"model": "demo", "messages": [{"role": "user", "content": "%s"}]}' % text) == 400


async def a_slow_body(gateway: Gate) -> None:
    body = (bytes([byte]) for byte in STREAMED)
    assert await status_of(gateway, head(f"Content-Length: {len(STREAMED)}"), *body, every_s=0.02) in (0, 408)


async def a_slow_head(gateway: Gate) -> None:
    assert await status_of(gateway, *(bytes([byte]) for byte in head()), every_s=0.02) in (0, 408)


async def a_reader_that_does_not_read(gateway: Gate) -> None:
    _, writer = await connect(gateway, limit=1024)
    body = json.dumps({**CHAT, "stream": True, "user": "flood"}).encode()
    body = body.replace(b"hello", b"flood")
    writer.write(head(f"Content-Length: {len(body)}") + body)
    while not any(b"flood" in str(asked.chat).encode() and asked.ended for asked in gateway.engine.asked):
        await asyncio.sleep(0.01)
    writer.close()


async def half_closed_sockets(gateway: Gate) -> None:
    """Whoever will send nothing more has gone, as far as HTTP/1.1 knows; there is an end for all of them."""
    for sent in (
        b"",
        b"POST",
        head(f"Content-Length: {len(STREAMED)}"),
        head(f"Content-Length: {len(STREAMED)}") + STREAMED,
    ):
        reader, writer = await connect(gateway)
        writer.write(sent)
        await writer.drain()
        writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        await asyncio.wait_for(reader.read(), 5)
        writer.close()


async def floods_of_headers(gateway: Gate) -> None:
    many = [f"X-{number}: {'a' * 100}" for number in range(1000)]
    assert await status_of(gateway, head(*many)) == 431
    assert await status_of(gateway, b"GET /" + b"a" * MB) == 431


async def decompression_bombs(gateway: Gate) -> None:
    bomb = gzip.compress(b" " * (100 * MB), 1)
    for coding in ("gzip", "x-gzip", "deflate", "br", "gzip, gzip", "identity, gzip"):
        assert await post(gateway, bomb[:50_000], **{"content-encoding": coding}) == 415
    chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (50_000, bomb[:50_000])
    assert await status_of(gateway, head("Transfer-Encoding: gzip, chunked"), chunk) == 400  # it is no JSON as it is


async def words_of_templates_and_logs(gateway: Gate) -> None:
    evil = "{{ cycler.__init__.__globals__ }}{% include '/etc/passwd' %}\x1b[2J\r\ngateway: all is lost"
    answers = await asyncio.gather(
        gateway.chat(messages=[{"role": "user", "content": f"say {evil}"}]),
        gateway.chat(model=evil),
        gateway.chat(**{evil: 1}),
        gateway.chat(user=evil, metadata={evil: evil}),
        gateway.http.get("/v1/models/" + httpx.URL("http://x/").copy_with(params={"q": evil}).query.decode()[2:]),
        gateway.http.get("/%0d%0agateway:%20all%20is%20lost"),
    )
    assert [answer.status_code for answer in answers] == [200, 404, 400, 200, 404, 404]
    (said,) = [asked for asked in gateway.engine.asked if "say {{" in str(asked.chat)]
    assert said.chat["messages"][0]["content"] == f"say {evil}"  # words, to be read as they are


ATTACKS: tuple[Attack, ...] = (
    deep_nesting, a_hundred_megabytes_announced, a_hundred_megabytes_in_pieces, bad_utf8, a_slow_body, a_slow_head,
    a_reader_that_does_not_read, half_closed_sockets, floods_of_headers, decompression_bombs,
    words_of_templates_and_logs,
)  # fmt: skip


# --- and what comes of it ----------------------------------------------------------------------------------------


async def test_good_streams_go_on_unharmed(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    attacks_are_over = asyncio.Event()

    async def script(asked):
        if "flood" in str(asked.chat):
            while True:
                yield piece("x" * 65536)
                await asyncio.sleep(0)
        if "good" not in str(asked.chat):
            yield piece("answer", "stop")
            return
        while not attacks_are_over.is_set():
            await asyncio.sleep(0.02)
            yield piece("x")
        yield piece("!", "stop")

    memory = psutil.Process().memory_info
    async with gate(MemoryTransport(script), Settings(limits=LIMITS)) as gateway:
        messages = [{"role": "user", "content": "good"}]
        good = [asyncio.create_task(gateway.chunks(messages=messages)) for _ in range(8)]
        while len(gateway.engine.asked) < 8:
            await asyncio.sleep(0.005)
        before = memory().rss
        outcomes = await asyncio.gather(*(attack(gateway) for attack in ATTACKS), return_exceptions=True)
        grown = memory().rss - before
        attacks_are_over.set()
        for chunks in await asyncio.gather(*good):
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            assert text == "x" * (len(text) - 1) + "!" and len(text) > 5
        wrong = {attack.__name__: error for attack, error in zip(ATTACKS, outcomes, strict=True) if error}
        assert not wrong
        assert (await gateway.chat(messages=messages)).status_code == 200
        while gateway.pool.in_flight():
            await asyncio.sleep(0.01)
    assert grown < 300 * MB  # ours as well: two hundred were sent, and the bomb made
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    for line in caplog.text.splitlines():
        assert not line.startswith("gateway: all is lost") and "\x1b" not in line
