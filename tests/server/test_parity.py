"""Greedy tokens through the server are transformers' tokens, for every family, whatever else goes on.

Each request is batched with eight others; prompts come in chunks of at most 32 tokens; the KV cache is too small for
all of them, so that requests are preempted and recomputed; with and without the prefix cache.

Tokens are compared through text: these models' tokenizer has one character for each id, and no two ids share one. So
a text has exactly one sequence of ids, and `ord` gives it.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Server
from requests_helper import wait_idle

from flashserve_client import AsyncClient
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model

FIRST_CHARACTER = 0x4E00
COMMON_PREFIX = 40
LENGTHS = (150, 1, 5, 16, 17, 41, 64, 90, 33)
NUM_TOKENS = 36
SEEDS = {"mistral": 1, "qwen3": 1}
CLEAR_MARGIN = 1e-3
"""Between the logits of the best and the second token: float32 in another order of sums changes them by 1e-5."""

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_model_len": 192,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 24,  # the requests need 46 at their ends
}


def prompts() -> list[list[int]]:
    """Those that are long enough begin alike."""
    rng = random.Random(7)
    common = [rng.randrange(3, VOCAB_SIZE) for _ in range(COMMON_PREFIX)]
    return [(common + [rng.randrange(3, VOCAB_SIZE) for _ in range(n)])[-n if n < COMMON_PREFIX else 0 :][:n]
            for n in LENGTHS]  # fmt: skip


def write_one_character_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    vocab = {chr(FIRST_CHARACTER + i): i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=chr(FIRST_CHARACTER)))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def ids_of(text: str) -> list[int]:
    return [ord(character) - FIRST_CHARACTER for character in text]


def reference(folder: Path) -> list[list[int]]:
    """What transformers generates for each prompt alone."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # a second one gains nothing at this size, and waits for a busy core
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    answers = []
    for prompt in prompts():
        result = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = torch.stack(result.logits)[:, 0].topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > CLEAR_MARGIN, "not decided: the model needs another seed"
        answers.append(result.sequences[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family."""
    made = {}
    for family in FAMILIES:
        made[family] = make_tiny_model(family, tmp_path_factory.mktemp(family), seed=SEEDS.get(family, 0))
        write_one_character_tokenizer(made[family])
    return made


@pytest.fixture(scope="module")
def families(folders: dict[str, Path]) -> Iterator[Server]:
    """All families in one server, each with and without the prefix cache."""
    models = {
        model_name(family, cached): {"model": str(folder), "enable_prefix_caching": cached, **SETTINGS}
        for family, folder in folders.items()
        for cached in (True, False)
    }
    with Server(models, ready_timeout_s=110) as server:
        yield server


def model_name(family: str, cached: bool) -> str:
    return f"{family}-{'cached' if cached else 'uncached'}"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("family", FAMILIES)
async def test_greedy_tokens_are_transformers(families: Server, folders: dict[str, Path], family: str) -> None:
    expected = reference(folders[family])
    assert len(set(map(tuple, expected))) == len(expected), "the prompts matter"
    for cached in (True, False):
        name = model_name(family, cached)
        async with AsyncClient(f"grpc://{families.grpc}", model=name) as client:

            async def tokens(prompt: list[int], client: AsyncClient = client) -> list[int]:
                result = await client.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
                assert result.completion_tokens == NUM_TOKENS
                return ids_of(result.text)

            assert [await tokens(prompt) for prompt in prompts()] == expected, f"{name}, one at a time"
            for again in range(3):
                together = await asyncio.gather(*map(tokens, prompts()))
                assert together == expected, f"{name}, batched, round {again}"
        assert_it_was_hard(families, name, cached)


def assert_it_was_hard(server: Server, name: str, cached: bool) -> None:
    """Chunks, preemptions and cache hits really happened."""
    wait_idle(server, name)
    assert server.metric("vllm:num_preemptions_total", model=name) > 0
    assert server.metric("flashserve:prefill_chunks_total", model=name) > len(LENGTHS)
    hits = server.metric("vllm:prefix_cache_hits_total", model=name)
    assert hits >= COMMON_PREFIX if cached else hits == 0
