"""Embeddings, several samples and a prompt's progress through a real tritonserver, over both protocols."""

from __future__ import annotations

import asyncio
import json
import math
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashserve_client import AsyncClient, Client, InvalidRequest
from harness import Server
from requests_helper import ASK_FOR_ALL, call_one, generate
from shared_servers import letters

TEXTS = ["def f(", "a red fox sleeps " * 40, "x"]
HIDDEN_SIZE = 64


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, server: Server) -> str:
    return f"grpc://{server.grpc}" if request.param == "grpc" else server.http


@pytest.fixture(scope="module")
def hidden(server: Server) -> Iterator[object]:
    """Final hidden states of the model llama, [T, hidden], by transformers."""
    import torch
    from transformers import AutoModel

    settings = json.loads((server.repository / "llama" / "1" / "model.json").read_text())
    model = AutoModel.from_pretrained(Path(settings["model"]), dtype=torch.float32).eval()

    def states(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).last_hidden_state[0].numpy()

    yield states


async def test_they_are_those_of_transformers_beside_requests_that_generate(url: str, hidden):
    settings = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
    async with AsyncClient(url, model="llama", timeout_s=60) as client:
        alone = await client.generate("hello", **settings)
        asks = [(text, pooling) for text in TEXTS for pooling in ("last", "mean", "cls")]
        generating = [client.generate("hello", **settings) for _ in range(3)]
        embedding = [client.embed(text, pooling=pooling, normalize=False) for text, pooling in asks]
        answers = await asyncio.gather(*generating, *embedding)
        for answer in answers[:3]:
            assert answer.text == alone.text
        for (text, pooling), answer in zip(asks, answers[3:], strict=True):
            ids = await client.tokenize(text)
            states = hidden(ids)
            expected = {"last": states[-1], "mean": states.mean(0), "cls": states[0]}[pooling]
            np.testing.assert_allclose(answer.embedding, expected, atol=1e-3)
            assert answer.prompt_tokens == len(ids)
        again = await client.embed(TEXTS[1], dimensions=8)
        assert again.timings.cached_tokens > 0
        assert len(again.embedding) == 8
        assert math.hypot(*again.embedding) == pytest.approx(1, abs=1e-6)


def test_the_answer_in_the_contracts_form(server: Server):
    ask = {"embedding_request": json.dumps({"input": [40, 41, 42], "pooling_params": {"dimensions": [2]}})}
    outputs = generate(server, model="letters", **ask, **ASK_FOR_ALL)
    assert json.loads(outputs["text_output"]) == pytest.approx([math.sqrt(0.5)] * 2)  # a null device's are all one
    assert (outputs["num_input_tokens"], outputs["num_output_tokens"], outputs["finish_reason"]) == (3, 0, "stop")
    metrics = json.loads(outputs["request_metrics"])
    assert metrics["ttft_ms"] >= 0 and metrics["decode_ms"] is None
    plain = call_one(server, model="letters", embedding_request=json.dumps({"input": "hello"}))
    assert len(json.loads(plain.text)) == HIDDEN_SIZE


def test_what_is_wrong_is_named(url: str):
    with Client(url, model="letters", timeout_s=30) as client:
        for options, words in (
            ({"dimensions": 65}, r"dimensions must be an integer in \[1, 64\]"),
            ({"pooling": "max"}, "pooling must be last, mean, cls"),
            ({"temperature": 0.5}, "takes no sampling parameters"),
        ):
            with pytest.raises(InvalidRequest, match=words):
                client.embed("a", **options)


def test_all_samples_whole_and_streamed(url: str):
    settings = {"n": 3, "max_tokens": 12, "temperature": 1.0, "seed": 5, "ignore_eos": True}
    with Client(url, model="llama", timeout_s=60) as client:
        whole = client.generate("hello", **settings)
        assert [sample.index for sample in whole.completions] == [0, 1, 2]
        assert len({sample.text for sample in whole.completions}) == 3
        assert whole.completion_tokens == 36
        texts = [""] * 3
        with client.stream("hello", **settings) as stream:
            for delta in stream:
                texts[delta.index] += delta.text
        assert texts == [sample.text for sample in whole.completions]
        assert stream.result.completions == whole.completions


def test_a_stream_says_how_far_its_prompt_is(url: str):
    prompt = [40] * 1450
    with Client(url, model="paced", timeout_s=30) as client:
        settings = {"max_tokens": 4, "ignore_eos": True, "cache_salt": uuid.uuid4().hex}
        deltas = list(client.stream(prompt, return_progress=True, **settings))
        told = [delta.progress for delta in deltas if delta.progress is not None]
        assert {(progress.total, progress.cache) for progress in told} == {(1450, 0)}
        assert [progress.processed for progress in told] == sorted({progress.processed for progress in told})
        assert told[-1].processed == 1450
        assert [delta.progress for delta in deltas[len(told) :]] == [None] * (len(deltas) - len(told))
        assert "".join(delta.text for delta in deltas) == letters(1450, 4)
        assert all(delta.progress is None for delta in client.stream(prompt, **settings))
