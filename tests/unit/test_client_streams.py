"""Streams over either protocol: what the reader gets when all goes well, and when the server does not."""

from __future__ import annotations

import asyncio
import contextlib
import time
from itertools import pairwise

import pytest

from client_peers import PEERS, Error, Garbage, HttpPeer, Peer, Relay, endless, say, silent
from flashserve_client import (
    AsyncClient,
    ConnectionFailed,
    DeadlineExceeded,
    Delta,
    InternalError,
    Timeout,
    Unavailable,
)
from flashserve_client import stream as stream_module


@pytest.fixture(params=PEERS)
async def peer(request):
    async with PEERS[request.param]() as peer:
        yield peer


def answer(*items):
    """A script of fixed responses."""

    async def script(asked):
        for item in items:
            yield item

    return script


async def read(client, **params):
    stream = client.stream("x", **params)
    return [delta async for delta in stream], stream


async def test_a_stream_gives_deltas_and_then_the_result(peer: Peer):
    async with AsyncClient(peer.url) as client:
        deltas, stream = await read(client)
    assert deltas == [Delta("one ", 1, None), Delta("two ", 1, None), Delta("three", 1, "stop")]
    result = stream.result
    assert (result.text, result.finish_reason) == ("one two three", "stop")
    assert (result.prompt_tokens, result.completion_tokens) == (3, 3)
    assert (result.timings.queue_ms, result.timings.cached_tokens, result.timings.ttft_ms) == (1.5, 2, None)
    assert 0 < result.ttft_s <= result.latency_s < 5
    assert result.request_id == peer.asked[0].request_id


async def test_generate_gives_the_same_result(peer: Peer):
    async with AsyncClient(peer.url) as client:
        result = await client.generate("x")
    assert (result.text, result.finish_reason, result.completion_tokens) == ("one two three", "stop", 3)
    assert result.timings.queue_ms == 1.5


async def test_merged_responses_count_all_their_tokens(peer: Peer):
    peer.script = answer(say("a"), say("bcd", tokens=3), say("", "length", tokens=0))
    async with AsyncClient(peer.url) as client:
        deltas, stream = await read(client)
    assert [delta.completion_tokens for delta in deltas] == [1, 3, 0]
    assert (stream.result.completion_tokens, stream.result.finish_reason) == (4, "length")


async def test_keep_alives_are_skipped_but_tokens_without_text_are_not(peer: Peer):
    peer.script = answer(say(tokens=0), say(tokens=0), say("", tokens=1), say("é", "stop"))
    async with AsyncClient(peer.url) as client:
        deltas, _ = await read(client)
    assert deltas == [Delta("", 1, None), Delta("é", 1, "stop")]


async def test_text_is_passed_through_unchanged(peer: Peer):
    text = "\r\n\n data: é 你好 😀 \x00 \u2028\u2029 end"
    peer.script = answer(say(text), say(text, "stop"))
    async with AsyncClient(peer.url) as client:
        _, stream = await read(client)
    assert stream.result.text == text * 2


async def test_there_is_no_result_before_the_end(peer: Peer):
    async with AsyncClient(peer.url) as client, client.stream("x") as stream:
        assert not stream.finished
        with pytest.raises(RuntimeError, match="no result yet"):
            _ = stream.result
        await stream.__anext__()
        with pytest.raises(RuntimeError, match="no result yet"):
            _ = stream.result


async def test_a_finished_stream_stays_finished(peer: Peer):
    async with AsyncClient(peer.url) as client:
        _, stream = await read(client)
        assert [delta async for delta in stream] == []
        await stream.aclose()
        assert stream.result.text == "one two three"


async def test_100_streams_share_a_client(peer: Peer):
    async with AsyncClient(peer.url) as client:
        results = await asyncio.gather(*(read(client) for _ in range(100)))
    assert {stream.result.text for _, stream in results} == {"one two three"}


async def test_http_connections_are_used_again():
    async with HttpPeer() as peer, AsyncClient(peer.url) as client:
        for _ in range(5):
            await read(client)
            await client.generate("x")
        assert peer.connections == 1


# --- errors -----------------------------------------------------------------------------------------------------


async def test_an_error_instead_of_an_answer(peer: Peer):
    peer.script = answer(Error("queue is full [code=UNAVAILABLE retry_after_ms=850]"))
    async with AsyncClient(peer.url) as client:
        for work in (client.generate("x"), read(client)):
            with pytest.raises(Unavailable, match=r"^queue is full$") as caught:
                await work
            assert caught.value.retry_after_ms == 850


async def test_an_error_in_the_middle_carries_what_came_before(peer: Peer):
    peer.script = answer(say("a"), say("b"), Error("too late [code=CANCELLED reason=deadline]"))
    async with AsyncClient(peer.url) as client:
        with pytest.raises(DeadlineExceeded) as caught:
            await read(client)
    partial = caught.value.partial
    assert (partial.text, partial.completion_tokens, partial.finish_reason) == ("ab", 2, None)


async def test_no_server_says_where_it_was_looked_for(unused_port_url):
    async with AsyncClient(unused_port_url) as client:
        for work in (client.generate("x"), read(client), client.models()):
            with pytest.raises(ConnectionFailed, match="no server at") as caught:
                await work
            assert caught.value.reason == "unreachable"


@pytest.fixture(params=PEERS)
async def unused_port_url(request):
    peer = PEERS[request.param]()
    await peer.start()
    await peer.stop()
    return peer.url


async def test_a_server_that_comes_back_is_found_again(peer: Peer):
    async with AsyncClient(peer.url) as client:
        await client.generate("x")
        await peer.stop()
        with pytest.raises(ConnectionFailed):
            await client.generate("x")
        await peer.start()
        deadline = time.monotonic() + 4
        while True:
            try:
                assert (await client.generate("x")).text == "one two three"
                break
            except ConnectionFailed:
                assert time.monotonic() < deadline, "gRPC's back-off must not grow to minutes"
                await asyncio.sleep(0.1)


async def test_a_broken_connection_is_not_an_end(peer: Peer):
    peer.script = endless
    async with Relay(peer) as relay, AsyncClient(relay.url) as client:
        stream = client.stream("x")
        assert (await stream.__anext__()).text == "x"
        relay.cut()
        with pytest.raises(ConnectionFailed, match="broke") as caught:
            async for _ in stream:
                pass
    assert caught.value.partial.text.startswith("x")


async def test_an_end_without_a_finish_reason_is_an_error(peer: Peer):
    peer.script = answer(say("a"))
    async with AsyncClient(peer.url) as client:
        with pytest.raises(ConnectionFailed, match="not complete"):
            await read(client)


@pytest.mark.parametrize(
    "bad", [Garbage(), say("x", "stop", request_metrics="{oops"), say("x", "stop", request_metrics="[1]")]
)
async def test_garbage_is_an_error_of_the_server(peer: Peer, bad):
    peer.script = answer(say("a"), bad)
    async with AsyncClient(peer.url) as client:
        with pytest.raises(InternalError):
            await read(client)


@pytest.mark.parametrize("status", [502, 503, 404, 500])
async def test_a_proxys_error_page(status):
    async def page(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        body = b"<html>bad gateway</html>"
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, AsyncClient(f"http://127.0.0.1:{port}") as client:
        for work in (client.generate("x"), read(client), client.models()):
            with pytest.raises(Exception, match=f"HTTP {status}: <html>bad gateway") as caught:
                await work
            expected = {502: "UNAVAILABLE", 503: "UNAVAILABLE", 404: "NOT_FOUND", 500: "INTERNAL"}
            assert caught.value.code == expected[status]


# --- time -------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_grace(monkeypatch):
    monkeypatch.setattr(stream_module, "CLIENT_GRACE_S", 0.1)


async def test_a_hung_server_cannot_hang_the_caller(peer: Peer, short_grace):
    peer.script = silent
    async with AsyncClient(peer.url, timeout_s=0.2) as client:
        for work in (client.generate("x"), read(client)):
            started = time.monotonic()
            with pytest.raises(Timeout):
                await work
            assert 0.25 < time.monotonic() - started < 1


async def test_a_server_that_never_ends_cannot_either(peer: Peer, short_grace):
    peer.script = endless
    async with AsyncClient(peer.url) as client:
        started = time.monotonic()
        with pytest.raises(Timeout) as caught:
            await read(client, timeout_s=0.2)
        assert 0.25 < time.monotonic() - started < 1
    assert caught.value.partial.completion_tokens > 5
    await asyncio.wait_for(peer.asked[0].over.wait(), 2)
    assert peer.asked[0].cancelled


async def test_the_time_between_reads_counts(peer: Peer, short_grace):
    async with AsyncClient(peer.url) as client, client.stream("x", timeout_s=0.1) as stream:
        await stream.__anext__()
        await asyncio.sleep(0.3)
        with pytest.raises(Timeout):
            await stream.__anext__()


async def test_a_callers_own_timeout_stays_the_callers(peer: Peer):
    peer.script = silent
    async with AsyncClient(peer.url) as client:
        with pytest.raises((TimeoutError, asyncio.TimeoutError)) as caught:
            await asyncio.wait_for(client.generate("x", timeout_s=30), 0.2)
        assert not isinstance(caught.value, Timeout)


async def test_a_task_that_survived_a_cancellation_gets_its_timeout(peer: Peer, short_grace):
    peer.script = silent

    async def stubborn(client):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10)
        with pytest.raises(Timeout):
            await client.generate("x", timeout_s=0.1)

    async with AsyncClient(peer.url) as client:
        task = asyncio.create_task(stubborn(client))
        await asyncio.sleep(0.05)
        task.cancel()
        await task


async def test_health_of_a_hung_server_is_bounded(peer: Peer):
    peer.script = silent
    async with AsyncClient(peer.url) as client:
        started = time.monotonic()
        health = await client.health(timeout_s=0.3)
        assert time.monotonic() - started < 1
    assert (health.server_live, health.model_ready, health.engine_ready) == (True, True, False)
    assert health.detail == "no answer within 0.3 s"


# --- retries ----------------------------------------------------------------------------------------------------


def refuse(times, retry_after_ms=60):
    """Refuses the first requests, then answers."""
    left = [times]

    async def script(asked):
        if left[0] > 0:
            left[0] -= 1
            yield Error(f"queue is full [code=UNAVAILABLE retry_after_ms={retry_after_ms}]")
        else:
            yield say("ok", "stop")

    return script


async def test_without_retries_a_refusal_is_final(peer: Peer):
    peer.script = refuse(1)
    async with AsyncClient(peer.url) as client:
        with pytest.raises(Unavailable):
            await client.generate("x")


async def test_retries_wait_as_long_as_the_server_asks(peer: Peer):
    peer.script = refuse(2)
    async with AsyncClient(peer.url, retries=2) as client:
        started = time.monotonic()
        assert (await client.generate("x")).text == "ok"
        assert 0.12 <= time.monotonic() - started < 1
        peer.script = refuse(1)
        deltas, _ = await read(client)
        assert deltas == [Delta("ok", 1, "stop")]
    assert len({asked.request_id for asked in peer.asked[:3]}) == 1


async def test_retries_are_bounded(peer: Peer):
    peer.script = refuse(3)
    async with AsyncClient(peer.url, retries=2) as client:
        with pytest.raises(Unavailable):
            await client.generate("x")
    assert len(peer.asked) == 3


async def test_a_retry_has_less_time_and_does_not_outlast_the_deadline(peer: Peer):
    peer.script = refuse(9, retry_after_ms=750)
    async with AsyncClient(peer.url, retries=9) as client:
        with pytest.raises(Unavailable):
            await client.generate("x", timeout_s=2)
    left = [asked.sampling["timeout_ms"] for asked in peer.asked]
    assert left[0] == 2000
    assert all(after <= before - 750 for before, after in pairwise(left))
    assert 1 < len(left) <= 3  # a fourth would come after the deadline


async def test_nothing_is_retried_after_the_first_token(peer: Peer):
    peer.script = answer(say("a"), Error("the engine died [code=UNAVAILABLE retry_after_ms=10]"))
    async with AsyncClient(peer.url, retries=3) as client:
        with pytest.raises(Unavailable):
            await read(client)
    assert len(peer.asked) == 1


async def test_a_refusal_after_keep_alives_may_be_retried(peer: Peer):
    first = [True]

    async def script(asked):
        yield say(tokens=0)
        if first:
            first.clear()
            yield Error("draining [code=UNAVAILABLE retry_after_ms=10]")
        else:
            yield say("ok", "stop")

    peer.script = script
    async with AsyncClient(peer.url, retries=1) as client:
        deltas, _ = await read(client)
    assert deltas == [Delta("ok", 1, "stop")]
