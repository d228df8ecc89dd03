"""Answers that are more than one text, or none: `n` samples, embeddings, and how far a prompt is."""

from __future__ import annotations

import asyncio
import json

import pytest

from client_peers import PEERS, Peer, say
from flashserve_client import AsyncClient, Client, Completion, Delta, InternalError, InvalidRequest, PromptProgress


@pytest.fixture(params=PEERS)
async def peer(request):
    async with PEERS[request.param]() as peer:
        yield peer


def answer(*items):
    async def script(asked):
        for item in items:
            yield item

    return script


WHOLE = say(["one", "zwei é", ""], ["stop", "length", "stop"], [1, 2, 0])


async def test_all_samples_of_a_whole_answer(peer: Peer):
    peer.script = answer(WHOLE)
    async with AsyncClient(peer.url) as client:
        result = await client.generate("x", n=3)
    assert peer.asked[0].sampling["n"] == 3
    assert result.completions == (
        Completion(0, "one", 1, "stop"),
        Completion(1, "zwei é", 2, "length"),
        Completion(2, "", 0, "stop"),
    )
    assert (result.text, result.finish_reason, result.completion_tokens, result.prompt_tokens) == ("one", "stop", 3, 3)


async def test_one_sample_is_one_completion(peer: Peer):
    async with AsyncClient(peer.url) as client:
        result = await client.generate("x")
    assert result.completions == (Completion(0, "one two three", 3, "stop"),)


async def test_pieces_say_whose_they_are(peer: Peer):
    """One that has ended says so again in each later response, which is no news."""
    peer.script = answer(
        say(["a", "b"], ["None", "None"], [1, 1]),
        say(["", ""], ["None", "None"], [0, 0]),
        say(["", "c"], ["None", "stop"], [1, 1]),
        say(["d", ""], ["None", "stop"], [1, 0]),
        say(["", ""], ["length", "stop"], [0, 0], request_metrics='{"queue_ms": 1.5}'),
    )
    async with AsyncClient(peer.url) as client, client.stream("x", n=2) as stream:
        deltas = []
        async for delta in stream:
            assert stream.finished == (delta == Delta("", 0, "length", 0))
            deltas.append(delta)
    assert deltas == [
        Delta("a", 1, None, 0), Delta("b", 1, None, 1), Delta("", 1, None, 0), Delta("c", 1, "stop", 1),
        Delta("d", 1, None, 0), Delta("", 0, "length", 0),
    ]  # fmt: skip
    assert [sample.text for sample in stream.result.completions] == ["ad", "bc"]
    assert stream.result.completion_tokens == 5
    assert stream.result.timings.queue_ms == 1.5


@pytest.mark.parametrize("n", [1, 3])
async def test_another_number_of_samples_than_asked_for_is_an_error(peer: Peer, n: int):
    peer.script = answer(say(["a", "b"], ["stop", "stop"], [1, 1]))
    async with AsyncClient(peer.url) as client:
        with pytest.raises(InternalError, match=f"2 texts, {n} were asked for"):
            await client.generate("x", n=n)


async def test_samples_without_a_client_of_ones_own_loop():
    async with PEERS["grpc"](answer(WHOLE)) as peer:

        def ask():
            with Client(peer.url) as client:
                return [delta.index for delta in client.stream("x", n=3)]

        assert await asyncio.to_thread(ask) == [0, 1, 2]


# --- how far a prompt is ----------------------------------------------------------------------------------------


async def test_progress_comes_before_and_with_the_first_token(peer: Peer):
    def progress(processed):
        return json.dumps({"total": 300, "cache": 16, "processed": processed, "time_ms": 2.5})

    peer.script = answer(
        say("", tokens=0, prompt_progress=progress(128)), say("a", prompt_progress=progress(300)), say("b", "stop")
    )
    async with AsyncClient(peer.url) as client, client.stream("x", return_progress=True) as stream:
        deltas = [delta async for delta in stream]
    assert peer.asked[0].inputs["return_progress"] is True
    assert "return_progress" not in peer.asked[0].sampling
    assert [(delta.text, delta.progress) for delta in deltas] == [
        ("", PromptProgress(300, 16, 128, 2.5)), ("a", PromptProgress(300, 16, 300, 2.5)), ("b", None),
    ]  # fmt: skip


async def test_progress_is_asked_for_by_name_only(peer: Peer):
    async with AsyncClient(peer.url) as client:
        async for _ in client.stream("x"):
            pass
        with pytest.raises(InvalidRequest, match="return_progress: only a stream"):
            await client.generate("x", return_progress=True)
    assert "return_progress" not in peer.asked[0].inputs


async def test_progress_that_nobody_can_read(peer: Peer):
    peer.script = answer(say("", tokens=0, prompt_progress='{"total": 3}'))
    async with AsyncClient(peer.url) as client:
        with pytest.raises(InternalError, match="figures that cannot be read"):
            await client.stream("x", return_progress=True).__anext__()


# --- embeddings -------------------------------------------------------------------------------------------------


async def test_an_embedding(peer: Peer):
    peer.script = answer(say("[0.5, -1, 2e-05]", "stop", 0, request_metrics='{"cached_tokens": 2}'))
    async with AsyncClient(peer.url, timeout_s=7) as client:
        result = await client.embed("é", pooling="mean", dimensions=3, truncate_prompt_tokens=5, priority=2)
        await client.embed([1, 2], normalize=False)
    assert result.embedding == [0.5, -1, 2e-05]
    assert (result.prompt_tokens, result.timings.cached_tokens, len(result.request_id)) == (3, 2, 16)
    first, second = peer.asked
    assert json.loads(first.inputs["embedding_request"]) == {
        "input": "é",
        "pooling_params": {"pooling": "mean", "dimensions": 3},
    }
    assert first.sampling == {"truncate_prompt_tokens": 5, "priority": 2, "timeout_ms": 7000}
    assert json.loads(second.inputs["embedding_request"]) == {"input": [1, 2], "pooling_params": {"normalize": False}}
    assert "text_input" not in first.inputs and "stream" not in first.inputs


@pytest.mark.parametrize("text", ["", "{}", "no"])
async def test_an_answer_that_is_no_embedding(peer: Peer, text: str):
    peer.script = answer(say(text, "stop", 0))
    async with AsyncClient(peer.url) as client:
        with pytest.raises(InternalError, match="the server's answer is no embedding"):
            await client.embed("x")


@pytest.mark.parametrize(
    ("prompt", "words"), [("\ud800", "lone surrogate"), ([], "a list of ints"), (["a"], "item 0 is 'a', not an int")]
)
async def test_what_cannot_be_embedded(prompt, words):
    async with AsyncClient("grpc://127.0.0.1:1") as client:
        with pytest.raises(InvalidRequest, match=words):
            await client.embed(prompt)
