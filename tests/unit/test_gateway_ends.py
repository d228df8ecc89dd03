"""Clients that leave, wait, read slowly or send what no client should: what the gateway does, and that others go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import types

import httpx
import psutil
import pytest

from flashserve_gateway.settings import Limits, Settings
from gateway_peers import CHAT, Gate, MemoryTransport, endless, gate, piece, says, silent


async def connect(gateway: Gate, limit: int = 1 << 16) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = httpx.URL(gateway.url)
    return await asyncio.open_connection(address.host, address.port, limit=limit)


def request(body: bytes, *headers: str, path: str = "/v1/chat/completions") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *headers, "", ""]).encode() + body


STREAMED = json.dumps({**CHAT, "stream": True}).encode()
WHOLE = json.dumps(CHAT).encode()
COMPLETION = json.dumps({"model": "demo", "prompt": ["a", "b"]}).encode()


# --- clients that leave ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [endless, silent], ids=["while it is written", "before its first token"])
@pytest.mark.parametrize("body", [STREAMED, WHOLE])
async def test_a_client_that_leaves_ends_its_request_in_the_engine(script, body: bytes):
    async with gate(MemoryTransport(script)) as gateway:
        _, writer = await connect(gateway)
        writer.write(request(body))
        while not gateway.engine.asked:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        writer.close()
        assert await gateway.ended() == "cancelled"
        assert gateway.pool.in_flight() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_all_prompts_of_a_client_that_leaves_end(stream: bool):
    async with gate(MemoryTransport(endless)) as gateway:
        _, writer = await connect(gateway)
        body = json.dumps({"model": "demo", "prompt": ["a", "b", "c"], "stream": stream}).encode()
        writer.write(request(body, path="/v1/completions"))
        while len(gateway.engine.asked) < 3:
            await asyncio.sleep(0.005)
        writer.close()
        assert [await gateway.ended(number) for number in range(3)] == ["cancelled"] * 3


async def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten():
    async with gate() as gateway:
        _, writer = await connect(gateway)
        writer.write(request(WHOLE)[:-5])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        for _ in range(100):
            text = (await gateway.http.get("/metrics")).text
            if 'status="499"' in text:
                break
            await asyncio.sleep(0.01)
        assert 'requests_total{endpoint="/v1/chat/completions",status="499"} 1.0' in text


# --- waiting -----------------------------------------------------------------------------------------------------


async def test_a_request_that_waits_gets_comments_and_then_its_answer():
    async def late(asked):
        await asyncio.sleep(0.3)
        yield piece("late", "stop")

    async with gate(MemoryTransport(late), Settings(keep_alive_s=0.05)) as gateway:
        text = (await gateway.chat(stream=True)).text
        assert text.startswith(": keep-alive\n\n")
        assert "late" in text and text.endswith("data: [DONE]\n\n")


async def test_an_answer_that_does_not_begin_is_given_up():
    settings = Settings(limits=Limits(first_token_timeout_s=0.1))
    async with gate(MemoryTransport(silent), settings) as gateway:
        response = await gateway.chat(stream=True)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "timeout"
        assert await gateway.ended() == "cancelled"


async def test_one_that_waited_longer_than_a_comment_is_told_in_an_event():
    settings = Settings(keep_alive_s=0.05, limits=Limits(first_token_timeout_s=0.2))
    async with gate(MemoryTransport(silent), settings) as gateway:
        response = await gateway.chat(stream=True)
        assert response.status_code == 200
        assert json.loads(response.text.split("data: ")[1])["error"]["code"] == "timeout"
        assert await gateway.ended() == "cancelled"


async def flood(asked):
    while True:
        yield piece("x" * 65536)
        await asyncio.sleep(0)


def connections(gateway: Gate) -> int:
    """The sockets that are open on the gateway's side."""
    port = httpx.URL(gateway.url).port
    return sum(
        item.laddr.port == port and item.pid == os.getpid() and item.status != psutil.CONN_LISTEN
        for item in psutil.net_connections("tcp")
        if item.laddr
    )


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_does_not_read_loses_its_connection(stream: bool, caplog: pytest.LogCaptureFixture):
    settings = Settings(keep_alive_s=0.05, limits=Limits(slow_reader_timeout_s=0.2))
    engine = MemoryTransport(flood if stream else says("x" * 20_000_000))
    async with gate(engine, settings) as gateway:
        _, writer = await connect(gateway, limit=1024)
        writer.write(request(STREAMED if stream else WHOLE))
        assert await gateway.ended(within_s=5) == ("cancelled" if stream else "whole")
        while connections(gateway):
            await asyncio.sleep(0.02)
        writer.close()
    assert "without completing" not in caplog.text


async def test_a_client_that_reads_slowly_keeps_its_stream():
    async def much(asked):
        for _ in range(200):
            yield piece("x" * 65536)
        yield piece("!", "stop")

    settings = Settings(limits=Limits(slow_reader_timeout_s=0.2))
    async with gate(MemoryTransport(much), settings) as gateway:
        reader, writer = await connect(gateway, limit=65536)
        writer.write(request(STREAMED, "Connection: close"))
        received = b""
        while data := await reader.read(200_000):
            received = (received + data)[-100:]
            await asyncio.sleep(0.005)
        assert b"[DONE]" in received
        writer.close()


async def test_waiting_for_a_client_to_read_takes_no_processor_time(monkeypatch: pytest.MonkeyPatch):
    slept: list[float] = []

    async def counted(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(seconds)

    own = types.SimpleNamespace(**{**vars(asyncio), "sleep": counted})
    monkeypatch.setattr("flashserve_gateway.sse.asyncio", own)
    settings = Settings(keep_alive_s=0.1, limits=Limits(slow_reader_timeout_s=1.0))
    async with gate(MemoryTransport(flood), settings) as gateway:
        _, writer = await connect(gateway, limit=1024)
        writer.write(request(STREAMED))
        assert await gateway.ended(within_s=5) == "cancelled"
        writer.close()
    assert slept and sum(seconds < 0.02 for seconds in slept) < 10


# --- what no client should send ----------------------------------------------------------------------------------


async def post(gateway: Gate, content: bytes, **headers: str) -> httpx.Response:
    return await gateway.http.post(
        "/v1/chat/completions", content=content, headers={"content-type": "application/json", **headers}
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'"text"', b"nul", b"\xff\xfe", b'{"model": "\xff"}', b'{"a": NaN}', b'{"model": "\\ud800"}',
     b"[" * 100_000, b'{"a":' * 5000, b"{" + b'"a":1,' * 5000],
)  # fmt: skip
async def test_a_body_that_is_no_json_object(content: bytes):
    async with gate() as gateway:
        response = await post(gateway, content)
        assert response.status_code == 400
        assert response.json()["error"]["message"].startswith("the body")


async def test_deep_nesting_where_objects_are_expected():
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    async with gate() as gateway:
        for field in (b"metadata", b"tools", b"messages", b"chat_template_kwargs", b"stop"):
            body = b'{"model": "demo", "messages": [{"role": "user", "content": "a"}], "' + field + b'": ' + deep + b"}"
            assert (await post(gateway, body)).status_code in (200, 400)


async def test_a_body_that_is_too_large_whether_it_says_so_or_not():
    async with gate(settings=Settings(limits=Limits(body_bytes=1000))) as gateway:
        assert (await post(gateway, b" " * 1001)).status_code == 413
        reader, writer = await connect(gateway)
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b" " * 1024 + b"\r\n")
        assert b" 413 " in await reader.readline()
        writer.close()
        assert (await gateway.chat()).status_code == 200


async def test_a_body_that_does_not_come():
    async with gate(settings=Settings(limits=Limits(body_timeout_s=0.1))) as gateway:
        reader, writer = await connect(gateway)
        writer.write(request(WHOLE)[:-5])
        assert b" 408 " in await reader.readline()
        writer.close()


async def test_a_compressed_body_and_one_that_says_it_is_text():
    async with gate() as gateway:
        assert (await post(gateway, b"\x1f\x8b", **{"content-encoding": "gzip"})).status_code == 415
        assert (await post(gateway, WHOLE, **{"content-type": "text/plain"})).status_code == 415
        assert not gateway.engine.asked


@pytest.mark.parametrize(
    "head",
    [
        b"GET /live HTTP/1.1\r\nX: " + b"a" * 1_000_000,
        b"GET /live?" + b"a" * 1_000_000,
        b"GET /live HTTP/1.1\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"a" * 500) for i in range(100)) + b"\r\n",
    ],
    ids=["a header without end", "an address without end", "many headers"],
)
async def test_a_flood_of_headers(head: bytes):
    async with gate() as gateway:
        reader, writer = await connect(gateway)
        writer.write(head)
        assert b" 431 " in await reader.readline()
        writer.close()
        assert (await gateway.http.get("/live")).status_code == 200


async def test_trailers_are_bounded_like_headers_and_dropped():
    async with gate() as gateway:
        reader, writer = await connect(gateway)
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(2000):
                writer.write(b"X-%d: %s\r\n" % (number, b"a" * 500))
                await writer.drain()
        assert b" 431 " in await reader.readline()
        writer.close()
        reader, writer = await connect(gateway)
        chunk = b"%x\r\n%s\r\n0\r\n" % (len(WHOLE), WHOLE)
        writer.write(head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk + b"Connection: close\r\n\r\n")
        assert b" 200 " in await reader.readline()
        writer.close()


async def test_names_that_were_made_to_point_here_are_refused():
    """A page of evil.example whose name resolves to 127.0.0.1 is of the same origin as the gateway."""
    async with gate() as gateway:
        port = httpx.URL(gateway.url).port
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "", "[::2]", "127.0.0.1.nip.io"):
            response = await gateway.http.get("/v1/models", headers={"host": host})
            assert response.status_code == 403, host
        assert (await post(gateway, WHOLE, host="evil.example")).status_code == 403
        assert not gateway.engine.asked
        for host in ("localhost", f"LOCALHOST:{port}", "127.0.0.1", "[::1]", f"[::1]:{port}"):
            assert (await gateway.http.get("/v1/models", headers={"host": host})).status_code == 200, host
    async with gate(settings=Settings(host="0.0.0.0")) as gateway:  # meant for others
        assert (await gateway.http.get("/v1/models", headers={"host": "gpu-1"})).status_code == 200


async def test_headers_of_moderate_size_pass_with_a_large_body():
    async with gate() as gateway:
        body = json.dumps({**CHAT, "user": "u" * 3_000_000}).encode()
        assert (await post(gateway, body, **{"x-long": "a" * 8000})).status_code == 200


async def test_a_head_that_does_not_end():
    async with gate(settings=Settings(limits=Limits(header_timeout_s=0.1))) as gateway:
        for start in (b"", b"GET /live HTTP/1.1\r\nHost:"):
            reader, writer = await connect(gateway)
            writer.write(start)
            assert b" 408 " in await reader.readline()
            writer.close()
        # A connection that has answered a request may idle for longer.
        reader, writer = await connect(gateway)
        for _ in range(2):
            writer.write(b"GET /live HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert b" 200 " in await reader.readline()
            await reader.readuntil(b"}")
            await asyncio.sleep(0.2)
        writer.close()


async def test_good_streams_go_on_beside_bad_clients():
    async def slow(asked):
        for _ in range(40):
            await asyncio.sleep(0.01)
            yield piece("x")
        yield piece("!", "stop")

    async with gate(MemoryTransport(slow)) as gateway:
        good = [asyncio.create_task(gateway.chunks()) for _ in range(8)]
        started = time.monotonic()
        while time.monotonic() - started < 0.3:
            await asyncio.gather(
                post(gateway, b"[" * 50_000), post(gateway, b"\xff" * 100_000), gateway.chat(logprobs=True)
            )
            _, writer = await connect(gateway)
            writer.write(request(STREAMED))
            writer.close()
        for chunks in await asyncio.gather(*good):
            assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "x" * 40 + "!"


async def test_a_bug_is_told_without_its_words(monkeypatch: pytest.MonkeyPatch):
    def broken(call: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("flashserve_gateway.routes.chat.read_chat", broken)
    async with gate(MemoryTransport(says("a"))) as gateway:
        response = await gateway.chat()
        assert response.status_code == 500
        assert "secret" not in response.text
        assert response.headers["x-request-id"] in response.text
