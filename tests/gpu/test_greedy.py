"""Tokens of the whole engine on a GPU are the float32 reference's wherever rounding cannot decide."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from agreement import Agreement, agreement
from driver import Engine, load, random_prompts
from flashserve import LLM
from flashserve.model_card import read_model_card
from flashserve.runner.device import open_device
from flashserve.text.tokenizer import Tokenizer
from tiny_models import FAMILIES, make_tiny_model

LENGTHS = (3, 20, 45, 1, 33, 7, 130, 60, 16, 31)
NUM_TOKENS = 24
DEMO = Path(__file__).resolve().parents[2] / "model_repository" / "demo" / "1" / "weights"
PYTHON = (
    "def __init__(self, name, value):\n    self.name = ",
    "import os\nimport sys\n",
    "class TestCase(unittest.TestCase):\n    def test_",
    "    def __repr__(self):\n        return ",
    "for i in range(",
    "try:\n    import ",
    "if __name__ == ",
    '    def close(self):\n        """Close the ',
    "with open(filename, 'rb') as ",
    "self.assertEqual(len(",
)
SETTINGS = {"max_num_seqs": 6, "max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny models by (family, dtype of the checkpoint)."""
    made = {}

    def get(family: str, dtype: str = "float32"):
        if (family, dtype) not in made:
            made[family, dtype] = make_tiny_model(family, tmp_path_factory.mktemp(family), dtype=dtype)
        return made[family, dtype]

    return get


def judge(folder: Path, device: str, prompts=None, num_tokens: int = NUM_TOKENS, **settings) -> Agreement:
    engine = Engine(load(folder, open_device(device), **SETTINGS, **settings))
    try:
        return agreement(folder, engine, prompts or random_prompts(LENGTHS), num_tokens)
    finally:
        engine.core.close()


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32(family, enforce_eager, folders, device):
    folder = folders(family)
    found = judge(folder, device, enforce_eager=enforce_eager)
    assert found.num_positions == len(LENGTHS) * NUM_TOKENS
    assert found.wrong == []
    assert found.qualifying >= 0.99, found


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
# A random model's best two tokens are closer to each other than a trained one's: bfloat16's rounding decides half.
@pytest.mark.parametrize("dtype, share", [("float16", 0.9), ("bfloat16", 0.25)])
def test_16_bits(dtype, share, family, enforce_eager, folders, device):
    skip_without_bfloat16(dtype, device)
    folder = folders(family, dtype)
    found = judge(folder, device, dtype=dtype, enforce_eager=enforce_eager)
    assert found.wrong == []
    assert found.qualifying >= share, found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_an_fp8_cache(family, folders, device):
    """With scales that the start calibrates."""
    found = judge(folders(family, "float16"), device, dtype="float16", kv_cache_dtype="fp8")
    assert found.wrong == []


@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "eager"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_trained_model(dtype, enforce_eager, device):
    skip_without_bfloat16(dtype, device)
    tokenizer = Tokenizer.from_card(read_model_card(DEMO))
    prompts = [tokenizer.encode(text) for text in PYTHON]
    found = judge(DEMO, device, prompts, 48, dtype=dtype, enforce_eager=enforce_eager)
    assert found.wrong == []
    assert found.qualifying >= 0.9, found


def skip_without_bfloat16(dtype: str, device: str) -> None:
    if dtype == "bfloat16" and device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no bfloat16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kilobytes", [64, 32])
def test_little_shared_memory_makes_tiles_smaller(kilobytes, dtype, folders, device, monkeypatch):
    from flashserve_kernels.gpu import device as properties

    read = properties._read
    monkeypatch.setattr(
        properties, "_read", lambda where: dataclasses.replace(read(where), shared_memory_bytes=kilobytes << 10)
    )
    found = judge(make_wide_model(folders, dtype), device, random_prompts(LENGTHS[:5]), dtype=dtype)
    assert found.wrong == []


def make_wide_model(folders, dtype: str):
    """Heads of 128 numbers: tiles of the full size would take 160 KB."""
    folder = folders("llama", dtype).parent / f"wide-{dtype}"
    return make_tiny_model("llama", folder, dtype=dtype, head_dim=128)


def test_two_models_in_turns_and_from_other_threads(folders, device):
    """Each has streams of its own, whichever the caller's thread has at the moment."""
    families = ("llama", "qwen3")
    prompts = random_prompts(LENGTHS[:6])
    params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    expected, found = {}, {}
    for family in families:
        with LLM(folders(family), device=device, **SETTINGS) as llm:
            expected[family] = [result.token_ids for result in llm.generate(prompts, params)]
    with (
        LLM(folders("llama"), device=device, **SETTINGS) as one,
        LLM(folders("qwen3"), device=device, **SETTINGS) as two,
    ):
        for llm, family in ((one, "llama"), (two, "qwen3"), (one, "llama")):
            tokens = [result.token_ids for result in llm.generate(prompts, params)]
            assert tokens == expected[family]

        def work() -> None:
            found["llama"] = [result.token_ids for result in one.generate(prompts, params)]

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found["llama"] == expected["llama"]
