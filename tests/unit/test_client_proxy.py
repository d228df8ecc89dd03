"""The environment's proxy is told the server's own URL."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from flashserve_client import AsyncClient, InvalidRequest

SERVER = "triton.invalid:8000"


@pytest.fixture
async def asked(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """The first lines of what a proxy is asked for; it answers each with success."""
    lines: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append((await reader.readline()).decode().strip())
        while await reader.readline() != b"\r\n":
            pass
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n[]")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, url)
    monkeypatch.delenv("no_proxy", raising=False)
    yield lines
    server.close()


async def test_a_forward_proxy_gets_the_whole_url(asked: list[str]) -> None:
    async with AsyncClient(f"http://{SERVER}") as client:
        assert await client.models() == []
    paths = ("POST", "repository/index"), ("GET", "models/stats")
    assert asked == [f"{method} http://{SERVER}/v2/{path} HTTP/1.1" for method, path in paths]


async def test_a_tunnel_is_asked_for_by_the_servers_name(asked: list[str]) -> None:
    async with AsyncClient(f"https://{SERVER}") as client:
        await client.health()  # the tunnel ends at a proxy that speaks no TLS
    assert asked == [f"CONNECT {SERVER} HTTP/1.1"]


async def test_a_name_that_only_the_extension_can_say_is_refused(asked: list[str]) -> None:
    async with AsyncClient(f"http://{SERVER}") as client:
        with pytest.raises(InvalidRequest, match="cannot be sent through a proxy"):
            await client.generate("x", model='a"b')
    assert asked == []
