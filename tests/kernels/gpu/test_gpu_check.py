"""benchmarks.gpu_check without a GPU: every step of both stages that can run, runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_dry_run(stage, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--stage", str(stage), "--dry", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    [file] = tmp_path.glob("cpu/*.json")
    found = json.loads(file.read_text())
    ran = [name for name, step in found["steps"].items() if step["state"] == "ok"]
    assert {step["state"] for step in found["steps"].values()} == {"ok", "left out"} and len(ran) >= 4
    assert found["machine"]["device"] == "cpu" and found["figures"]["ceilings"]
    figures = [figure for section in found["figures"].values() for figure in section.values()]
    assert not [figure for figure in figures if isinstance(figure, dict) and isinstance(figure.get("error"), str)]
    if stage == 1:
        assert set(found["tests"].values()) == {"passed"}
        assert file.with_suffix(".tar.gz").stat().st_size > 1000
