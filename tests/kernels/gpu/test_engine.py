"""The whole engine on its Triton-lang kernels, in the interpreter: the tokens of the torch path."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gguf_writer import write_model
from tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
NUM_TOKENS = 5


GROUPS = {
    "token_embd": "Q8_0",
    "attn_q": "Q4_1",
    "attn_k": "Q8_0",
    "attn_v": "Q5_1",
    "ffn_gate": "Q4_0",
    "ffn_down": "Q4_1",
}


@pytest.mark.parametrize("family", ["gemma3", "qwen3", "gpt2"])
def test_greedy_tokens_are_those_of_the_torch_path(family, tmp_path, monkeypatch):
    """A prompt longer than a step's budget, shorter ones, decodes; windows, query norms, learned positions, GELU."""
    check(make_tiny_model(family, tmp_path), monkeypatch)


def test_weights_in_groups_are_those_of_the_file_dequantised(tmp_path, monkeypatch):
    """Torch has no weights in groups: there they become full ones. The table in groups is the head, too."""
    folder = make_tiny_model("llama", tmp_path / "folder", tie_word_embeddings=True)
    check(write_model(folder, tmp_path / "model.gguf", quantize=GROUPS), monkeypatch)


def check(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashserve import LLM

    rng = random.Random(1)
    prompts = [[rng.randrange(3, 512) for _ in range(length)] for length in (3, 40, 17)]
    monkeypatch.setenv("FLASHSERVE_KERNELS", "torch")
    with LLM(model, dtype="float32", num_threads=1, kv_cache_memory_bytes=1 << 20, max_model_len=96) as llm:
        params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        expected = [result.token_ids for result in llm.generate(prompts, params)]
    script = Path(__file__).with_name("interpreted_engine.py")
    folders = os.pathsep.join(
        [
            *(str(ROOT / name) for name in ("backend", "kernels", "client", "tests/support")),
            os.environ.get("PYTHONPATH", ""),
        ]
    )
    done = subprocess.run(
        [sys.executable, str(script), str(model), json.dumps(prompts), str(NUM_TOKENS)],
        env={**os.environ, "PYTHONPATH": folders},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
