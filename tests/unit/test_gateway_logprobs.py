"""Log-probabilities in OpenAI's forms, validated by OpenAI's own types, in front of an engine in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from flashserve_client.transport import Chunk
from gateway_peers import Asked, gate

# "aé": é comes in two tokens; the third one was not among the two most probable.
TEXTS = ("a", "", "é", "!")
RANKS = (1, 1, 7, 2)


def entries(count: int) -> list[dict[str, Any]]:
    """As the engine writes them, with that many alternatives."""
    found = []
    for index, (text, rank) in enumerate(zip(TEXTS, RANKS, strict=True)):
        own = {str(index): {"logprob": -float(rank), "rank": rank, "decoded_token": text}}
        others = {
            str(100 + r): {"logprob": -float(r), "rank": r, "decoded_token": f"<{r}>"} for r in range(1, count + 1)
        }
        if rank <= count:
            del others[str(100 + rank)]
        found.append({**own, **others})
    return found


async def scores(asked: Asked):
    """Says "aé!", one token after the other if it is to stream."""
    count = asked.sampling.get("logprobs")
    found = None if count is None else entries(count)
    prompt = None
    if "prompt_logprobs" in asked.sampling:
        prompt = json.dumps([None, {"7": {"logprob": -9999.0, "rank": 90, "decoded_token": "lo"}}])
    metrics = '{"queue_ms": 1}'
    if not asked.request.stream:
        yield Chunk("aé!", "stop", 3, 4, metrics, found and json.dumps(found), found and -11.0, prompt)
        return
    for index, text in enumerate(TEXTS):
        finish = "stop" if index == len(TEXTS) - 1 else "None"
        yield Chunk(text, finish, 3, 1, metrics, found and json.dumps(found[index : index + 1]), found and -1.0)


def flags(asked: Asked) -> set[str]:
    return {flag for flag in asked.request.flags if "logprob" in flag}


@pytest.mark.parametrize("count", [0, 2])
async def test_of_a_chat(count: int):
    async with gate() as gateway:
        gateway.engine.script = scores
        body = (await gateway.chat(logprobs=True, top_logprobs=count)).json()
        chunks = await gateway.chunks(logprobs=True, top_logprobs=count)
    assert gateway.engine.asked[0].sampling["logprobs"] == count
    assert flags(gateway.engine.asked[0]) == {"return_logprobs", "return_cumulative_logprob"}
    ChatCompletion.model_validate(body, strict=True)
    assert [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in chunks]
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    content = logprobs["content"]
    assert [(one["token"], one["logprob"]) for one in content] == [("a", -1.0), ("", -1.0), ("é", -7.0), ("!", -2.0)]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == body["choices"][0]["message"]["content"]
    tops = [[other["logprob"] for other in one["top_logprobs"]] for one in content]
    assert tops == [[-float(r) for r in range(1, count + 1)]] * 4
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one for found in streamed if found for one in found["content"]] == content
    assert streamed[0] is None and streamed[-1] is None


async def test_who_asks_for_none_gets_null_and_asks_the_engine_for_none():
    async with gate() as gateway:
        gateway.engine.script = scores
        bodies = [(await gateway.chat(**more)).json() for more in ({}, {"logprobs": False}, {"logprobs": None})]
        chunks = await gateway.chunks()
    assert {body["choices"][0]["logprobs"] for body in bodies} == {None}
    assert {chunk["choices"][0]["logprobs"] for chunk in chunks} == {None}
    assert not any(flags(asked) or "logprobs" in asked.sampling for asked in gateway.engine.asked)


async def complete(gateway, **more: Any):
    return await gateway.http.post("/v1/completions", json={"model": "demo", "prompt": "hello", **more})


async def test_of_a_completion():
    async with gate() as gateway:
        gateway.engine.script = scores
        body = (await complete(gateway, logprobs=2)).json()
        stream = (await complete(gateway, logprobs=2, stream=True)).text
    Completion.model_validate(body, strict=True)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list(TEXTS)
    assert logprobs["token_logprobs"] == [-1.0, -1.0, -7.0, -2.0]
    assert logprobs["text_offset"] == [0, 1, 1, 2]
    assert logprobs["top_logprobs"][0] == {"a": -1.0, "<2>": -2.0}
    assert logprobs["top_logprobs"][2] == {"<1>": -1.0, "<2>": -2.0, "é": -7.0}
    chunks = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: {")]
    assert [Completion.model_validate(chunk, strict=False) for chunk in chunks if chunk["choices"][0]["finish_reason"]]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, values in logprobs.items():
        assert [value for piece in pieces for value in piece[name]] == values


async def test_a_prompt_that_is_echoed_is_scored():
    async with gate() as gateway:
        gateway.engine.script = scores
        whole = (await complete(gateway, logprobs=1, echo=True)).json()["choices"][0]
        scored = (await complete(gateway, logprobs=1, echo=True, max_tokens=0)).json()
    assert whole["text"] == "helloaé!"
    assert whole["logprobs"]["tokens"] == ["hel", "lo", *TEXTS]
    assert whole["logprobs"]["text_offset"] == [0, 3, 5, 6, 6, 7]
    assert whole["logprobs"]["token_logprobs"][:2] == [None, -9999.0]
    assert whole["logprobs"]["top_logprobs"][0] is None
    (choice,) = scored["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["tokens"] == ["hel", "lo"]
    assert scored["usage"]["completion_tokens"] == 0
    assert gateway.engine.asked[1].sampling["max_tokens"] == 1


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be an integer in [0, 20], not 21"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "must be an integer in [0, 20], not -1"),
        ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs", "must be an integer"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs: true"),
        ({"logprobs": 3}, "logprobs", "must be true or false"),
    ],
)
async def test_wrong_values_of_a_chat(more: dict[str, Any], param: str, words: str):
    async with gate() as gateway:
        response = await gateway.chat(**more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param and words in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("more", "param", "words"),
    [
        ({"logprobs": 21}, "logprobs", "must be an integer in [0, 20], not 21"),
        ({"logprobs": True}, "logprobs", "must be an integer"),
        ({"logprobs": 1, "echo": True, "stream": True}, "echo", "has no logprobs"),
        ({"max_tokens": 0}, "max_tokens", "must be an integer in [1, 2^31-1], not 0"),
    ],
)
async def test_wrong_values_of_a_completion(more: dict[str, Any], param: str, words: str):
    async with gate() as gateway:
        response = await complete(gateway, **more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param and words in response.json()["error"]["message"]
