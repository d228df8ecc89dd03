"""A model's files: opened once per start, and served from wherever they lie."""

from __future__ import annotations

from safetensors.torch import load_file

from flashserve import LLM
from flashserve.config import EngineConfig
from flashserve.models import files as model_files
from flashserve.models.registry import open_model
from memory_files import MemoryFiles

SETTINGS = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 1 << 20, "num_threads": 1}


def test_a_start_reads_each_file_of_weights_once(folder, monkeypatch):
    opened = []
    checkpoint = model_files.Checkpoint
    monkeypatch.setattr(model_files, "Checkpoint", lambda path: opened.append(path) or checkpoint(path))
    with LLM(folder, **SETTINGS):
        pass
    assert opened == [folder]


def test_a_model_in_memory_gives_the_tokens_of_its_folder(folder, drive, random_prompts):
    prompts = random_prompts((3, 20, 45))
    expected = drive(folder, dtype="float32").generate(prompts, 8)
    files = MemoryFiles(open_model(EngineConfig(str(folder))).config, load_file(folder / "model.safetensors"))
    driver = drive(files=files, dtype="float32")
    assert driver.generate(prompts, 8) == expected
