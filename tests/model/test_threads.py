"""The limit on spinning takes effect only if it is set before torch loads its OpenMP library."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROBE = """
import os, sys
from flashserve import LLM
from flashserve.engine.loading import load_engine
from flashserve.engine import process
assert "torch" not in sys.modules, "too late"
try:
    LLM("/nowhere/at/all")
except Exception as error:
    assert "does not exist" in str(error), error
print(os.environ["GOMP_SPINCOUNT"])
"""


@pytest.mark.parametrize("own, expected", [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_spinning_is_limited_before_torch_is_imported(own, expected):
    environment = {key: value for key, value in os.environ.items() if key != "GOMP_SPINCOUNT"}
    environment.update({"PYTHONPATH": os.pathsep.join(sys.path), **own})
    probe = subprocess.run([sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=False)
    assert probe.returncode == 0, probe.stderr
    assert probe.stdout.strip() == expected
