"""A model's files: opened once per start, and served from wherever they lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashserve import LLM
from flashserve.config import EngineConfig
from flashserve.models import files as model_files
from flashserve.models.registry import open_model
from tiny_models import make_tiny_model

SETTINGS = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 1 << 20, "num_threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model("llama", tmp_path_factory.mktemp("llama"))


def test_a_start_reads_each_file_of_weights_once(folder, monkeypatch):
    opened = []
    checkpoint = model_files.Checkpoint
    monkeypatch.setattr(model_files, "Checkpoint", lambda path: opened.append(path) or checkpoint(path))
    with LLM(folder, **SETTINGS):
        pass
    assert opened == [folder]


class MemoryWeights:
    """Implements WeightSource over a dictionary."""

    quantization = None

    def __init__(self, tensors, dtype, device, ops):
        self._tensors, self.dtype, self.device, self.ops = dict(tensors), dtype, device, ops
        self._unused = set(tensors)

    def has(self, name):
        return name in self._tensors

    def read_into(self, name, out):
        self._unused.discard(name)
        out.copy_(self._tensors[name])

    def read(self, name, shape):
        out = torch.empty(shape, dtype=self.dtype)
        self.read_into(name, out)
        return out

    def scratch(self, shape):
        return torch.empty(shape, dtype=self.dtype)

    def mapped(self, name, shape):
        return None

    def finish(self, ignored):
        assert not self._unused


class MemoryFiles:
    """Implements ModelFiles without a file."""

    folder, dtype, tokenizer_file = Path("in memory"), "float32", ""

    def __init__(self, config, tensors):
        self.config, self._tensors = config, tensors

    def end_token_ids(self, vocab_size):
        return ()

    def has(self, name):
        return name in self._tensors

    def same(self, one, other):
        return torch.equal(self._tensors[one], self._tensors[other])

    def num_elements(self, ignored):
        return sum(tensor.numel() for tensor in self._tensors.values())

    def weights(self, dtype, device, ops, quantization):
        return MemoryWeights(self._tensors, dtype, device, ops)

    def fingerprint(self, dtype, layout):
        return "in memory"


def test_a_model_in_memory_gives_the_tokens_of_its_folder(folder, drive, random_prompts):
    prompts = random_prompts((3, 20, 45))
    expected = drive(folder, dtype="float32").generate(prompts, 8)
    files = MemoryFiles(open_model(EngineConfig(str(folder))).config, load_file(folder / "model.safetensors"))
    driver = drive(files=files, dtype="float32")
    assert driver.generate(prompts, 8) == expected
