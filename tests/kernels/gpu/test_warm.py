"""What is compiled ahead of a start is what the start looks up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_models import make_tiny_model

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FAMILIES = ("gemma3", "gpt2")  # windows, query norms, scaled embeddings; layer norms, learned positions


def run(*command: str, **variables: str) -> str:
    """The output of a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, *command],
        env={**environment, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_a_start_looks_up_the_keys_that_warming_up_writes(tmp_path):
    """Of the JIT's own key, over everything that an engine launches until it serves."""
    folders = [str(make_tiny_model(family, tmp_path / family)) for family in FAMILIES]
    for family, found in zip(FAMILIES, json.loads(run(str(HERE / "launch_keys.py"), *folders)), strict=True):
        assert len(found["launched"]) >= 20
        assert found["launched"] == found["warmed"], family


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_second_warm_up_compiles_nothing(tmp_path):
    """The command, in two processes: the cache that it fills answers the next one."""
    folder, cache = make_tiny_model("llama", tmp_path / "llama"), tmp_path / "cache"
    (tmp_path / "model.json").write_text(json.dumps({"model": str(folder), "max_num_seqs": 4, "max_model_len": 128}))
    command = ("warm", str(tmp_path / "model.json"), "--gpu", "h200", "--jobs", "2")
    code = "import sys; from flashserve.cli import main; sys.exit(main())"
    first = run("-c", code, *command, TRITON_CACHE_DIR=str(cache))
    assert "kernels compiled for H200 (sm_90)" in first
    entries = sorted(path.name for path in cache.iterdir())
    assert len(list(cache.glob("*/*.cubin"))) >= 20
    run("-c", code, *command, "--cache", str(cache), TRITON_CACHE_DIR=str(tmp_path / "elsewhere"))
    assert sorted(path.name for path in cache.iterdir()) == entries
