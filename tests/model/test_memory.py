"""Loading never needs much more memory than the weights take in the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from real_models import smollm2
from tiny_models import make_tiny_model

SIZES = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16384,
}

# Peak resident memory between two points. The tiny model comes first: libraries and thread pools are not weights.
PROBE = """
import json, sys
from pathlib import Path
from flashserve.config import EngineConfig
from flashserve.models.registry import open_model
from flashserve.runner.device import CpuDevice
from flashserve.runner.loading import load_runner

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024

def load(folder):
    config = EngineConfig(folder, dtype="bfloat16", kv_cache_memory_bytes=1 << 20, max_model_len=32, num_threads=1)
    return load_runner(open_model(config), config, CpuDevice())

first = load(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
before = resident("VmRSS")
runner = load(sys.argv[2])
after_load, peak = resident("VmRSS"), resident("VmHWM")
print(json.dumps({"weights": runner.resolved.model.weight_bytes, "peak": peak - before, "after": after_load - before}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
@pytest.mark.parametrize("case", ["plain", "tied", "sharded float32", "transposed"])
def test_peak_memory_is_at_most_1_2_times_the_weights(case, tmp_path):
    tiny = make_tiny_model("llama", tmp_path / "tiny", dtype="bfloat16")
    dtype = "float32" if case == "sharded float32" else "bfloat16"
    shard = "40MB" if case == "sharded float32" else "5GB"
    if case == "transposed":
        sizes = {"n_embd": 512, "n_layer": 16, "n_head": 8, "vocab_size": 16384, "n_positions": 1024}
        large = make_tiny_model("gpt2", tmp_path / "large", dtype=dtype, **sizes)
    else:
        large = make_tiny_model(
            "llama", tmp_path / "large", dtype=dtype, max_shard_size=shard, **SIZES, tie_word_embeddings=case == "tied"
        )
    figures = measure(tiny, large)
    assert figures["peak"] <= 1.2 * figures["weights"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_peak_memory_of_weights_in_groups_is_at_most_1_25_times_what_stays(tmp_path):
    file = smollm2()
    figures = measure(make_tiny_model("llama", tmp_path / "tiny", dtype="bfloat16"), file)
    assert 90e6 < figures["after"] < 1.4 * file.stat().st_size  # groups, and what a step needs
    assert figures["peak"] <= 1.25 * figures["after"]


def measure(tiny: Path, large: Path) -> dict[str, int]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    probe = subprocess.run(
        [sys.executable, "-c", PROBE, str(tiny), str(large)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.returncode == 0, probe.stderr
    figures = json.loads(probe.stdout.splitlines()[-1])
    assert figures["weights"] > 100e6
    print({name: f"{value / 1e6:.0f} MB" for name, value in figures.items()})
    return figures
