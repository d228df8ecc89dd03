"""Quantised weights, and an int8 KV cache, on a model that has learned something."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError
from flashserve.model_card import read_model_card
from flashserve.models.registry import open_model
from flashserve.text.tokenizer import Tokenizer
from real_models import smollm2
from tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "model_repository" / "demo" / "1" / "weights"
WINDOW = 512


def bits_per_token(driver, token_ids: list[int]) -> float:
    """Mean of -log2 p(token | the ones before it in its window)."""
    total, count = 0.0, 0
    for first in range(0, len(token_ids) - WINDOW, WINDOW):
        window = token_ids[first : first + WINDOW]
        scores = driver.prompt_logits(window).log_softmax(-1)
        chosen = scores[:-1].gather(1, torch.tensor(window[1:])[:, None])
        total, count = total - float(chosen.sum()) / math.log(2), count + len(window) - 1
    return total / count


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Python that the demo model has not seen: the engine's own."""
    tokenizer = Tokenizer.from_card(read_model_card(DEMO))
    files = sorted((ROOT / "backend" / "flashserve").rglob("*.py"))
    return tokenizer.encode("\n".join(file.read_text(encoding="utf-8") for file in files))[: 24 * WINDOW + 1]


SETTINGS = {"dtype": "bfloat16", "max_num_batched_tokens": WINDOW, "max_model_len": WINDOW, "enforce_eager": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "worse"),
    [({"quantization": "int8"}, 0.01), ({"kv_cache_dtype": "int8"}, 0.01), ({"quantization": "int4"}, 0.05)],
)
def test_perplexity_is_close_to_that_of_bfloat16(settings, worse, text, drive):
    plain = 2 ** bits_per_token(drive(DEMO, **SETTINGS), text)
    small = 2 ** bits_per_token(drive(DEMO, **SETTINGS, **settings), text)
    assert 1 < plain < 200  # it has learned something
    assert small != plain and abs(small / plain - 1) < worse, (plain, small)


@pytest.mark.slow
def test_perplexity_of_a_files_groups_is_within_1_percent_of_its_full_weights(drive):
    files = open_model(EngineConfig(str(smollm2())))
    tokenizer = Tokenizer.from_card(files.card)
    prose = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tokens = tokenizer.encode(prose)[: 3 * WINDOW + 1]
    full = 2 ** bits_per_token(drive(files=files, quantization="dense", **SETTINGS), tokens)
    kept = 2 ** bits_per_token(drive(files=files, **SETTINGS), tokens)
    assert kept != full and abs(kept / full - 1) < 0.01, (full, kept)


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_recorded_steps_give_the_logits_of_single_ops(settings, tmp_path, drive, random_prompts):
    folder = make_tiny_model("qwen2", tmp_path, dtype="bfloat16")
    prompts = random_prompts((3, 20, 45, 33, 130))
    recorded, single = (
        drive(folder, dtype="bfloat16", enforce_eager=eager, **settings).generate(prompts, 8, max_chunk=40)
        for eager in (False, True)
    )
    assert recorded == single


@pytest.mark.parametrize("settings", [{"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}])
def test_torch_refuses_what_it_lacks(settings, tmp_path, drive, monkeypatch):
    monkeypatch.setenv("FLASHSERVE_KERNELS", "torch")
    folder = make_tiny_model("llama", tmp_path)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        drive(folder, **settings)


def test_weights_that_cannot_be_quantised_are_refused(tmp_path, drive):
    folder = make_tiny_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="cannot be quantised in groups"):
        drive(folder, quantization="int4")
