"""One server for every test that only sends requests: its models, and what they answer.

A start takes seconds, most of them torch's import in each engine. So these models share one server for the whole
session, and each test leaves it as it was: nothing running, nothing waiting.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import Server
from tiny_models import make_tiny_model

# What the null device generates: token id 40 + position mod 80. In the tiny models' vocabulary ids 40 to 96 are the
# letters F to ~, and the 23 behind them bytes that begin no character.
NULL_IDS = range(40, 120)
LETTERS = "".join(map(chr, range(ord("F"), ord("~") + 1)))
EOS_LETTER = "d"  # ends a text, unless ignore_eos is set
REAL = {"dtype": "float32", "device": "cpu", "num_threads": 1, "kv_cache_memory_bytes": 32 << 20}

MODELS: dict[str, dict[str, Any]] = {
    # Random weights, really computed. 32 places: more requests than that wait.
    "llama": {**REAL, "max_num_seqs": 32, "max_num_batched_tokens": 256},
    "qwen3": {**REAL, "max_num_seqs": 8},
    # Computes nothing: the text is LETTERS, one character per token.
    "letters": {"device": "null", "kv_cache_memory_bytes": 8 << 20},
    # The same at 5 ms per step.
    "paced": {"device": "null:5", "kv_cache_memory_bytes": 8 << 20},
    # One request runs, two may wait.
    "narrow": {"device": "null:5", "max_num_seqs": 1, "max_waiting_requests": 2, "max_model_len": 1024},
    # Nobody but test_metrics asks it. Its 20 blocks hold one request of full length.
    "counted": {"device": "null:1", "max_model_len": 256, "num_gpu_blocks_override": 20, "max_num_batched_tokens": 128,
                "max_num_seqs": 4, "max_waiting_requests": 4},
}  # fmt: skip


def letters(num_prompt_tokens: int, count: int) -> str:
    """What a null device generates after a prompt of this length; ValueError where that is not all letters."""
    first = num_prompt_tokens % len(NULL_IDS)
    if first + count > len(LETTERS):
        raise ValueError(f"tokens {first} to {first + count} are not all letters")
    return LETTERS[first : first + count]


def make_models(folder: Path) -> dict[str, dict[str, Any]]:
    """The models' files in ``folder``, and their model.json by name."""
    llama = make_tiny_model("llama", folder / "llama")
    qwen3 = make_tiny_model("qwen3", folder / "qwen3")
    null = Path(shutil.copytree(llama, folder / "null"))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((null / name).read_text())
        (null / name).write_text(json.dumps({**values, "eos_token_id": NULL_IDS[LETTERS.index(EOS_LETTER)]}))
    weights = {"llama": llama, "qwen3": qwen3}
    return {name: {"model": str(weights.get(name, null)), **settings} for name, settings in MODELS.items()}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running server with all of MODELS."""
    with Server(make_models(tmp_path_factory.mktemp("models")), ready_timeout_s=110) as running:
        yield running
