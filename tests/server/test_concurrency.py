"""Many requests and several models at once: nobody gets anybody else's tokens, and each process keeps to its role."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import psutil
import pytest

from async_requests import engine_of
from flashserve_client import AsyncClient, GenerateResult
from harness import Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import COUNTERS_WITHIN_S, generate, stream_sse, text_of, wait_idle

STREAMS = 64
BIG_VOCABULARY = 150_000
STUB_LIMIT_MB = 300


def arguments(index: int) -> dict[str, Any]:
    """A request unlike all others: its prompt, its length, and whether and how it samples."""
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": index}
    return {
        "prompt": f"request {index}: " + "word " * (index % 23),
        "max_tokens": 4 + index,
        "ignore_eos": True,
        **(sampled if index % 3 else {"temperature": 0}),
    }


async def streamed(client: AsyncClient, **request: Any) -> GenerateResult:
    stream = client.stream(**request)
    texts = [delta.text async for delta in stream]
    assert "".join(texts) == stream.result.text
    return stream.result


async def test_64_concurrent_streams_are_what_each_is_alone(server: Server) -> None:
    """Over gRPC and SSE in turn. Half of them wait at first: the model runs 32 at once."""
    async with (
        AsyncClient(f"grpc://{server.grpc}", model="llama") as over_grpc,
        AsyncClient(server.http, model="llama") as over_sse,
    ):
        clients = [over_sse if index % 2 else over_grpc for index in range(STREAMS)]
        alone = [await streamed(client, **arguments(index)) for index, client in enumerate(clients)]
        before = await settled_steps(server)
        together = await asyncio.gather(*(streamed(client, **arguments(i)) for i, client in enumerate(clients)))
    assert [result.text for result in together] == [result.text for result in alone]
    assert [result.completion_tokens for result in together] == [4 + index for index in range(STREAMS)]
    assert {result.finish_reason for result in together} == {"length"}
    assert len({result.text for result in together}) == STREAMS
    # Each alone would take as many steps as it has tokens. How many are shared is a matter of how soon requests come.
    steps = await settled_steps(server) - before
    assert steps < sum(result.completion_tokens for result in together) / 2, "they shared steps"


async def settled_steps(server: Server) -> float:
    """Steps of the engine of `llama`, once it is idle and the counter has reached /metrics."""
    wait_idle(server, "llama")
    await asyncio.sleep(COUNTERS_WITHIN_S)
    return server.metric("flashserve:engine_steps_total", model="llama")


async def test_two_models_run_at_once_each_in_an_engine_of_its_own(server: Server) -> None:
    names = ("llama", "qwen3")
    async with AsyncClient(f"grpc://{server.grpc}", model="demo") as client:
        requests = [{**arguments(index), "model": name} for index in range(0, 24, 2) for name in names]
        alone = [await streamed(client, **request) for request in requests]
        together = await asyncio.gather(*(streamed(client, **request) for request in requests))
    assert [result.text for result in together] == [result.text for result in alone]
    assert together[0].text != together[1].text, "the models differ"
    engines = {name: engine_of(server, name).pid for name in names}
    assert len(set(engines.values())) == len(names)
    assert all("libtorch" in mapped(pid) for pid in engines.values())


def test_no_stub_maps_torch(server: Server) -> None:
    stubs = server.stubs()
    assert len(stubs) >= 2
    for stub in stubs:
        assert "torch" not in mapped(stub.pid)


def mapped(pid: int) -> str:
    """Paths of the files that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


# --- the stub's memory -------------------------------------------------------------------------------------


def write_big_tokenizer(folder: Path) -> None:
    """Byte-level BPE with 150,000 tokens: bytes, random pairs of them, and random pairs of pairs."""
    from tokenizers.pre_tokenizers import ByteLevel

    rng = random.Random(0)
    letters = sorted(ByteLevel.alphabet())
    pairs = rng.sample(list(product(letters, letters)), 30_000)
    words = ["".join(pair) for pair in pairs]
    missing = BIG_VOCABULARY - len(letters) - len(pairs)
    # Each index stands for one pair of words; 120,000 different ones give 120,000 different tokens of four bytes.
    chosen = (divmod(index, len(words)) for index in rng.sample(range(len(words) ** 2), missing))
    merges = [*pairs, *((words[left], words[right]) for left, right in chosen)]
    vocab = {token: index for index, token in enumerate([*letters, *map("".join, merges)])}
    assert len(vocab) == BIG_VOCABULARY
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")


@pytest.fixture(scope="module")
def big_vocabulary(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a loaded model with a vocabulary of 150,000 tokens; it is unloaded again."""
    folder = write_null_model(tmp_path_factory.mktemp("big"))
    write_big_tokenizer(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": BIG_VOCABULARY}))
    server.add_model("big", null_model(folder, kv_cache_memory_bytes=8 << 20))
    server.load("big")
    yield "big"
    server.unload("big")
    assert wait_until(lambda: not server.stubs("big"), 15)


def test_a_stub_with_a_big_vocabulary_stays_small(server: Server, big_vocabulary: str) -> None:
    rng = random.Random(1)
    for _ in range(20):
        text = "".join(map(chr, (rng.randrange(32, 0x3000) for _ in range(1000))))
        asked = generate(server, model=big_vocabulary, tokenize_request=json.dumps({"text": text}))
        ids = json.loads(asked["text_output"])["token_ids"]
        asked = generate(server, model=big_vocabulary, tokenize_request=json.dumps({"token_ids": ids}))
        assert json.loads(asked["text_output"])["text"] == text
        prompt = [rng.randrange(BIG_VOCABULARY) for _ in range(1000)]
        body = {"prompt_token_ids": json.dumps(prompt), "max_tokens": 80, "ignore_eos": True}
        whole = generate(server, model=big_vocabulary, **body)["text_output"]
        assert whole.endswith(text_of(stream_sse(server, model=big_vocabulary, **body)))
    (stub,) = server.stubs(big_vocabulary)
    assert "torch" not in mapped(stub.pid)
    assert psutil.Process(stub.pid).memory_info().rss / 1e6 < STUB_LIMIT_MB
