"""benchmarks.gpu on the kernels, in the interpreter as these tests correct it: does it run, and find them correct?"""

from __future__ import annotations

import json

from benchmarks.gpu import __main__ as gpu


def test_a_tiny_run_finds_every_kernel_correct(tmp_path, monkeypatch, device):
    monkeypatch.setenv("FLASHSERVE_KERNELS", "torch")
    arguments = ["--device", device.type, "--tiny", "--output", str(tmp_path)]
    assert gpu.main([*arguments, "--sections", "ceilings", "attention", "kernels"]) == 0
    [file] = tmp_path.glob("*/*.json")
    sections = json.loads(file.read_text())["sections"]
    figures = {name: found for key in ("attention", "kernels") for name, found in sections[key].items()}
    del figures["seconds"]
    assert len(figures) >= 14
    assert {name: found for name, found in figures.items() if not found.get("correct")} == {}
