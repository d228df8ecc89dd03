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

from flashserve_client import AsyncClient, GenerateResult
from harness import Server
from requests_helper import wait_metric
from tiny_models import FAMILIES, VOCAB_SIZE, make_tiny_model

FIRST_CHARACTER = 0x4E00
COMMON_PREFIX = 40
BLOCK_SIZE = 16
NUM_TOKENS = 36
MAX_ROUNDS = 10
SEEDS = {"mistral": 1, "qwen3": 2, "gpt2": 1}
CLEAR_MARGIN = 5e-4
"""Between the logits of the best and the second token: float32 is off by up to 2e-5 here."""

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "num_threads": 1,
    "max_model_len": 192,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 32,
    "block_size": BLOCK_SIZE,
    "num_gpu_blocks_override": 20,  # the requests need 51 at their ends
}


def prompts() -> list[list[int]]:
    """Nine; four begin alike, and one begins with what is the second block of those."""
    rng = random.Random(7)

    def some(count: int) -> list[int]:
        return [rng.randrange(3, VOCAB_SIZE) for _ in range(count)]

    common = some(COMMON_PREFIX)
    shifted = common[BLOCK_SIZE : 2 * BLOCK_SIZE]
    return [
        common + some(110),
        *map(some, (1, 5, 16, 17)),
        common + some(1),
        common + some(24),
        common + some(50),
        shifted + some(17),
    ]


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
    with Server(models, ready_timeout_s=200) as server:
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
            alone = [await greedy(client, prompt) for prompt in prompts()]
            assert [ids_of(result.text) for result in alone] == expected, f"{name}, one at a time"
            preemptions, rounds = 0, 0
            while rounds < 2 or (not preemptions and rounds < MAX_ROUNDS):  # it takes requests that really meet
                together = await asyncio.gather(*(greedy(client, prompt) for prompt in prompts()))
                assert [ids_of(result.text) for result in together] == expected, f"{name}, batched, round {rounds}"
                preemptions += sum(result.timings.preemptions or 0 for result in together)
                rounds += 1
        wait_metric(families, "vllm:num_preemptions_total", preemptions, model=name)
        assert preemptions > 0
        assert families.metric("flashserve:prefill_chunks_total", model=name) > 2 * len(prompts())
        hits = families.metric("vllm:prefix_cache_hits_total", model=name)
        assert hits >= COMMON_PREFIX if cached else hits == 0


async def greedy(client: AsyncClient, prompt: list[int]) -> GenerateResult:
    result = await client.generate(prompt, temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    assert result.completion_tokens == NUM_TOKENS
    return result
