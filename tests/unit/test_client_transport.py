"""A transport of one's own: the client without a server, for tests of what is built on it."""

from __future__ import annotations

import pytest

from flashserve_client import AsyncClient, Unavailable
from flashserve_client.transport import Chunk


class Memory:
    """Implements Transport and Reader: answers every request with the same chunks."""

    def __init__(self, chunks, failures=()):
        self._chunks, self._failures = chunks, list(failures)
        self.opened, self.closed = [], False

    def open(self, request):
        self.opened.append(request)
        self._left = iter(self._chunks)
        return self

    async def read(self):
        if self._failures:
            raise self._failures.pop()
        return next(self._left, None)

    async def aclose(self):
        self.closed = True


CHUNKS = (Chunk("one ", None, 3, 1), Chunk("two", "length", 3, 1))


async def test_requests_go_to_the_transport_that_is_given():
    transport = Memory(CHUNKS)
    async with AsyncClient(transport=transport, model="m") as client:
        result = await client.generate("x", max_tokens=2)
    assert (result.text, result.finish_reason, result.prompt_tokens, result.completion_tokens) == (
        "one two",
        "length",
        3,
        2,
    )
    assert [request.model for request in transport.opened] == ["m"]
    assert transport.closed


async def test_retries_are_the_clients_own():
    transport = Memory(CHUNKS, [Unavailable("busy", retry_after_ms=1)])
    async with AsyncClient(transport=transport, retries=1) as client:
        assert (await client.generate("x")).text == "one two"
    with pytest.raises(Unavailable):
        async with AsyncClient(transport=Memory(CHUNKS, [Unavailable("busy", retry_after_ms=1)])) as client:
            await client.generate("x")
