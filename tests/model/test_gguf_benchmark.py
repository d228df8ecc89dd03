"""benchmarks/gguf: what it makes of a file and of its rounds, with our engine in llama.cpp's place too."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from benchmarks.gguf import __main__ as benchmark
from gguf_writer import write_model
from tiny_models import make_tiny_model


@pytest.mark.parametrize("tied", [False, True])
def test_a_token_reads_the_head_and_not_a_table_of_its_own(tied, tmp_path):
    folder = make_tiny_model("llama", tmp_path / "folder", tie_word_embeddings=tied)
    config = json.loads((folder / "config.json").read_text())
    kv = config["num_key_value_heads"] * config["hidden_size"] // config["num_attention_heads"]
    layer = config["hidden_size"] * (2 * config["hidden_size"] + 2 * kv + 3 * config["intermediate_size"])
    matrices = config["num_hidden_layers"] * layer + config["vocab_size"] * config["hidden_size"]
    assert benchmark.Model("m", write_model(folder, tmp_path / "m.gguf")).matrix_bytes == 4 * matrices


def test_a_ratio_is_of_a_rounds_pair():
    measured = benchmark.Measured(benchmark.Cell(1, 8, 4), [1.0, 2.0, 4.0], [2.0, 6.0, 4.0])
    assert measured.ratios == benchmark.Spread(2.0, 1.0, 3.0)


@pytest.mark.slow
def test_both_engines_take_turns_and_results_are_written(tmp_path, monkeypatch, capsys):
    file = write_model(make_tiny_model("llama", tmp_path / "folder"), tmp_path / "m.gguf")
    stand_in = replace(benchmark.OURS, title="llama.cpp", options={"stand": "in"})
    monkeypatch.setattr(benchmark, "PEER", stand_in)
    monkeypatch.setattr(benchmark, "VOCAB_SIZE", 500)
    options = f"--models {file} --requests 1,2 --prompt 8 --output 3 --long 20 --rounds 2 --threads 1"
    monkeypatch.setattr(sys, "argv", ["gguf", *options.split(), f"--cache={tmp_path}", f"--out={tmp_path / 'out'}"])
    benchmark.main()
    assert "8 in, 3 out x 2" in capsys.readouterr().out
    (written,) = (tmp_path / "out").rglob("*.json")
    (model,) = json.loads(written.read_text())["models"]
    assert [len(cell["ours"]) for cell in model["cells"]] == [len(cell["peers"]) for cell in model["cells"]] == [2] * 3
