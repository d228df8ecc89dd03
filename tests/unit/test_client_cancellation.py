"""Whoever stops reading stops the server, whichever way they stop; and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time

import pytest

from client_peers import PEERS, Peer, endless, peer_in_thread, silent, until, words
from flashserve_client import AsyncClient, Cancelled, Client


@pytest.fixture(params=PEERS)
async def peer(request):
    async with PEERS[request.param](endless) as peer:
        yield peer


@pytest.fixture(params=PEERS)
def far_peer(request):
    """A server on another thread's loop."""
    with peer_in_thread(request.param, endless) as peer:
        yield peer


class OnThread:
    """The synchronous client, or a stream of it, with the methods of the asynchronous one: each call on a thread."""

    def __init__(self, plain):
        self._plain = plain

    def stream(self, *args, **options):
        return OnThread(self._plain.stream(*args, **options))

    def __aiter__(self):
        return self

    async def __anext__(self):
        delta = await asyncio.to_thread(next, self._plain, None)
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def generate(self, *args, **options):
        return await asyncio.to_thread(self._plain.generate, *args, **options)

    async def aclose(self):
        await asyncio.to_thread(self._plain.close)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.aclose()


@pytest.fixture(params=["async", "sync"])
def connect(request):
    return AsyncClient if request.param == "async" else lambda url: OnThread(Client(url))


async def consume(stream):
    async for _ in stream:
        pass


async def cancelled(peer: Peer) -> bool:
    """Whether every request was ended by the client."""
    return await until(lambda: bool(peer.asked) and all(asked.cancelled for asked in peer.asked))


async def test_closing_the_stream(peer: Peer, connect):
    async with connect(peer.url) as client:
        stream = client.stream("x")
        await stream.__anext__()
        await stream.aclose()
        assert await cancelled(peer)
        with pytest.raises(Cancelled):
            await stream.__anext__()


async def test_leaving_its_with_block(peer: Peer, connect):
    async with connect(peer.url) as client:
        async with client.stream("x") as stream:
            await stream.__anext__()
        assert await cancelled(peer)


async def test_dropping_it_after_a_break(peer: Peer, connect):
    async with connect(peer.url) as client:
        async for _ in client.stream("x"):
            break
        gc.collect()
        assert await cancelled(peer)


async def test_dropping_it_in_another_thread(peer: Peer):
    async with AsyncClient(peer.url) as client:
        box = [client.stream("x")]
        await box[0].__anext__()
        thread = threading.Thread(target=box.clear)
        thread.start()
        thread.join()
        assert await cancelled(peer)


async def test_cancelling_the_task_that_reads(peer: Peer):
    async with AsyncClient(peer.url) as client:
        task = asyncio.create_task(consume(client.stream("x")))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(peer)


@pytest.mark.parametrize("stream", [False, True])
async def test_cancelling_the_task_that_waits_for_a_first_answer(peer: Peer, stream: bool):
    peer.script = silent
    async with AsyncClient(peer.url) as client:
        task = asyncio.create_task(consume(client.stream("x")) if stream else client.generate("x"))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await cancelled(peer)


@pytest.mark.parametrize("script", [endless, silent])
async def test_closing_under_a_reader_tells_the_reader(peer: Peer, connect, script):
    peer.script = script
    async with connect(peer.url) as client:
        stream = client.stream("x", timeout_s=20)
        task = asyncio.create_task(consume(stream))
        await asyncio.sleep(0.1)
        await stream.aclose()
        with pytest.raises(Cancelled, match="the stream was closed"):
            await asyncio.wait_for(task, 2)
        assert await cancelled(peer)


async def test_closing_the_client_ends_its_streams(peer: Peer, connect):
    client = connect(peer.url)
    tasks = [asyncio.create_task(consume(client.stream("x"))) for _ in range(5)]
    assert await until(lambda: len(peer.asked) == 5)
    await client.aclose()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, Cancelled)
    assert await cancelled(peer)


async def test_closing_before_anything_was_sent_sends_nothing(peer: Peer, connect):
    async with connect(peer.url) as client, client.stream("x"):
        pass
    assert peer.asked == []


async def test_a_client_that_is_closed_says_so(peer: Peer, connect):
    client = connect(peer.url)
    await client.aclose()
    await client.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await client.generate("x")
    with pytest.raises(RuntimeError, match="closed"):
        client.stream("x")


async def test_a_burst_of_cancellations_leaves_the_client_usable(peer: Peer, connect):
    async with connect(peer.url) as client:
        streams = [client.stream("x") for _ in range(50)]
        await asyncio.gather(*(stream.__anext__() for stream in streams))
        await asyncio.gather(*(stream.aclose() for stream in streams))
        assert await cancelled(peer)
        peer.script = words
        assert (await client.generate("x")).text == "one two three"


# --- the synchronous client -------------------------------------------------------------------------------------


def cancelled_far(peer: Peer) -> bool:
    return asyncio.run(cancelled(peer))


def test_sync_dropping_the_client(far_peer: Peer):
    client = Client(far_peer.url)
    next(client.stream("x"))
    del client
    gc.collect()
    assert cancelled_far(far_peer)
    assert asyncio.run(until(lambda: not client_threads()))


def client_threads():
    return [thread for thread in threading.enumerate() if thread.name == "flashserve-client"]


def test_sync_no_thread_and_no_socket_is_left(far_peer: Peer):
    def use():
        with Client(far_peer.url) as client:
            far_peer.script = words
            list(client.stream("x"))
            client.generate("x")
            far_peer.script = endless
            stream = client.stream("x")
            next(stream)
        assert not client_threads()

    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def grows():
        """Whether three uses leave descriptors behind, within two seconds."""
        before = descriptors()
        for _ in range(3):
            use()
        deadline = time.monotonic() + 2
        while descriptors() > before and time.monotonic() < deadline:
            time.sleep(0.02)
        return descriptors() > before

    use()
    # grpc keeps some for the process, more on a busy machine; a leak is one that goes on.
    assert not all(grows() for _ in range(4))
