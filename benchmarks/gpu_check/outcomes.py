"""A plugin of pytest: each test's outcome, written when it is known, so that a run that is killed keeps those before.

OUTCOMES=file python -m pytest -p benchmarks.gpu_check.outcomes
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "OUTCOMES"


def pytest_runtest_logreport(report: Any) -> None:
    """A line of JSON for each test; setting up and tearing down count where they fail or skip."""
    if report.when == "call" or report.outcome != "passed":
        with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"test": report.nodeid, "outcome": report.outcome}) + "\n")


def read_outcomes(file: Path) -> dict[str, str]:
    """Outcome by test: the worst of those that it has. A line that is not whole yet is left out."""
    found: dict[str, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if file.is_file() else ():
        if line.endswith("\n"):
            entry = json.loads(line)
            if found.get(entry["test"]) != "failed":
                found[entry["test"]] = entry["outcome"]
    return found
