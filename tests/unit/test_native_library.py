"""The native kernels are compiled once, however many engines need them at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LIBRARY = Path(__file__).parents[2] / "kernels" / "flashserve_kernels" / "cpu" / "library.py"

# The module alone, as the wheel's build loads it: its package would bring torch.
PROGRAM = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("library", {str(LIBRARY)!r})
library = importlib.util.module_from_spec(spec)
spec.loader.exec_module(library)
library.build("baseline", Path(sys.argv[1]))
print(Path(sys.argv[1]).read_text())
"""
COMPILER = """#!/bin/sh
sleep 0.2
for last; do :; done  # what follows -o
echo "$last" >> "$COMPILED"
echo library > "$last"
"""


def test_processes_that_start_together_compile_it_once(tmp_path):
    compiler, compiled, file = tmp_path / "g++", tmp_path / "compiled", tmp_path / "cache" / "library.so"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "COMPILED": str(compiled)}
    command = [sys.executable, "-c", PROGRAM, str(file)]
    engines = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [engine.communicate(timeout=60)[0].strip() for engine in engines] == ["library"] * 3
    outputs = [Path(line).suffix for line in compiled.read_text().splitlines()]
    sources = list((LIBRARY.parent / "src").glob("*.cpp"))
    assert sorted(outputs) == [".o"] * len(sources) + [".so"]
