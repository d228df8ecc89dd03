"""Quantised weights, and an int8 KV cache, on a model that has learned something."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashserve.errors import ConfigError
from flashserve.model_card import read_model_card
from flashserve.protocol import SamplingParams
from flashserve.runner.staging import array_fields, num_bytes, tensor_fields
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput
from flashserve.text.tokenizer import Tokenizer
from tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "model_repository" / "demo" / "1" / "weights"
WINDOW = 512


def bits_per_token(driver, token_ids: list[int]) -> float:
    """Mean of -log2 p(token | the ones before it in its window)."""
    total, count = 0.0, 0
    for first in range(0, len(token_ids) - WINDOW, WINDOW):
        window = token_ids[first : first + WINDOW]
        scores = all_logits(driver.runner, window).log_softmax(-1)
        chosen = scores[:-1].gather(1, torch.tensor(window[1:])[:, None])
        total, count = total - float(chosen.sum()) / math.log(2), count + len(window) - 1
    return total / count


@torch.inference_mode()
def all_logits(runner, tokens: list[int]) -> torch.Tensor:
    """The logits of every token of one prompt, [T, V] float32."""
    blocks = list(range(-(-len(tokens) // 16)))
    row = ScheduledRow(0, 0, 0, len(tokens), tokens, blocks, 1)
    admission = Admission(0, 0, SamplingParams(temperature=0), 0, len(tokens), ())
    step = runner._builder.arrange(SchedulerOutput(0, [admission], [row], len(tokens), []))
    buffer = torch.zeros(num_bytes(step.sizes), dtype=torch.uint8)
    runner._builder.fill(step, array_fields(buffer, step.sizes), step.sizes)
    fields = replace(tensor_fields(buffer, step.sizes), logits_rows=torch.arange(len(tokens)))
    return runner._step_model.logits(fields, len(tokens)).float()


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Python that the demo model has not seen: the engine's own."""
    tokenizer = Tokenizer.from_card(read_model_card(DEMO))
    files = sorted((ROOT / "backend" / "flashserve").rglob("*.py"))
    return tokenizer.encode("\n".join(file.read_text(encoding="utf-8") for file in files))[: 24 * WINDOW + 1]


SETTINGS = {"dtype": "bfloat16", "max_num_batched_tokens": WINDOW, "max_model_len": WINDOW, "enforce_eager": True}


@pytest.mark.parametrize(
    ("settings", "worse"),
    [({"quantization": "int8"}, 0.01), ({"kv_cache_dtype": "int8"}, 0.01), ({"quantization": "int4"}, 0.05)],
)
def test_perplexity_is_close_to_that_of_bfloat16(settings, worse, text, drive):
    plain = 2 ** bits_per_token(drive(DEMO, **SETTINGS), text)
    small = 2 ** bits_per_token(drive(DEMO, **SETTINGS, **settings), text)
    assert 1 < plain < 200  # it has learned something
    assert small != plain and abs(small / plain - 1) < worse, (plain, small)


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
