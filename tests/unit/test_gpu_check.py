"""benchmarks.gpu_check without a GPU: what becomes of steps, of what they leave behind, and of the goals."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu.report import TARGETS
from benchmarks.gpu_check.goals import FAMILIES, TESTED, judge
from benchmarks.gpu_check.outcomes import read_outcomes
from benchmarks.gpu_check.runner import Check, summary
from benchmarks.gpu_check.steps import STAGE_LIMITS_S, STEPS, Step

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDERS = {"python", "site", "wheels", "scratch", "figures", "machine", "cache", "archive", "work"}


def shell(script: str, name: str = "step", limit_s: int = 60) -> Step:
    return Step(name, 1, limit_s, ("sh", "-c", script))


@pytest.fixture
def check(tmp_path):
    values = {"python": sys.executable, "cache": str(tmp_path / "cache")}
    values |= {name: str(tmp_path / f"{name}.json") for name in ("figures", "machine")}

    def make(*steps: Step, dry: bool = False) -> Check:
        return Check(steps, values, tmp_path, tmp_path / "results", "check", dry=dry)

    return make


def states(check: Check) -> dict[str, str]:
    return {name: outcome.state for name, outcome in check.done.items()}


def test_all_steps_of_a_stage_fit_into_it():
    for stage, limit_s in STAGE_LIMITS_S.items():
        steps = [step for step in STEPS if step.stage == stage]
        assert sum(step.limit_s for step in steps) <= limit_s
        assert len({step.name for step in steps}) == len(steps)
        assert any(step.dry is not None for step in steps)


def test_commands_name_what_exists():
    for step in STEPS:
        for words in (step.command, step.dry or ()):
            fields = {field for word in words for _, field, _, _ in string.Formatter().parse(word) if field}
            assert fields <= PLACEHOLDERS
            for word in words:
                if re.fullmatch(r"tests/\S+\.py", word):
                    assert (ROOT / word).is_file(), word


def test_goals_of_tests_name_tests_that_exist():
    names = []
    for file in (ROOT / "tests" / "gpu").glob("test_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names += [f"{file.name}::{node.name}" for node in tree.body if isinstance(node, ast.FunctionDef)]
    for goal in TESTED:
        assert any(re.search(goal.pattern, name) for name in names), goal
    tiny_models = pytest.importorskip("tiny_models")
    assert tuple(tiny_models.FAMILIES) == FAMILIES


def test_a_step_that_hangs_loses_itself_alone(check, tmp_path):
    pid = tmp_path / "pid"
    hangs = f"echo begun; sleep 99 & echo $! > {pid}; wait"
    run = check(shell(hangs, "hangs", limit_s=3), shell("echo broken >&2; exit 5", "fails"), shell("true", "runs"))
    run.run(60)
    assert states(run) == {"hangs": "timed out", "fails": "failed", "runs": "ok"}
    assert "begun" in run.done["hangs"].tail and "broken" in run.done["fails"].tail
    # Its child went with it; a zombie of a container without an init counts as gone.
    status = Path("/proc", pid.read_text().strip(), "status")
    deadline = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_a_step_wrote_before_it_was_killed_is_kept(check, tmp_path):
    figures = {"sections": {"qwen3-8b": {"decode 1 x 1024 graphs": {"of_copy": 0.84}}}}
    failed = {"test": "tests/gpu/test_greedy.py::test_float32[llama]", "outcome": "failed"}
    (tmp_path / "made").write_text(json.dumps(figures))
    (tmp_path / "lines").write_text(json.dumps(failed) + '\n{"test": "half a li')
    (tmp_path / "card").write_text('{"device": "NVIDIA H200"}')
    code = f'cd {tmp_path}; cp lines "$OUTCOMES"; cp made figures.json; sleep 99'
    run = check(shell(code, "figures", limit_s=3), shell(f"cd {tmp_path}; cp card machine.json", "machine"))
    run.run(60)
    [file] = (tmp_path / "results").glob("*/*.json")
    assert file == tmp_path / "results" / "nvidia-h200" / "check.json"
    found = json.loads(file.read_text())
    assert found["steps"]["figures"]["state"] == "timed out" and found["figures"] == figures["sections"]
    verdicts = {text: goal["verdict"] for text, goal in found["goals"].items()}
    assert verdicts["batch-1 decode of the 8B shape / copy bandwidth"] == "met"
    assert verdicts["greedy tokens are the reference's, every family"] == "missed"
    assert verdicts["prefill attention, 8k, head size 128, TFLOP/s"] == "not measured"
    assert any("0.84 ≥ 0.82" in line for line in summary(found))


def test_a_stage_without_time_begins_nothing(check):
    run = check(shell("true"))
    run.run(1)
    assert states(run) == {"step": "no time left"}


def test_a_dry_run_judges_nothing(check, tmp_path):
    run = check(Step("real", 1, 60, ("false",)), Step("both", 1, 60, ("false",), ("true",)), dry=True)
    run.run(60)
    assert states(run) == {"real": "left out", "both": "ok"}
    assert run.result()["goals"] == {} and "measures nothing" in summary(run.result())[-1]


def test_a_program_that_is_not_there_is_a_step_that_failed(check):
    run = check(Step("sanitizer", 1, 60, ("no-such-program",)))
    run.run(60)
    assert states(run) == {"sanitizer": "failed"} and "no-such-program" in run.done["sanitizer"].tail[0]


def test_goals_are_met_missed_or_not_measured():
    test = "tests/gpu/test_greedy.py::test_float32[{}-eager]"
    every = {test.format(family): "passed" for family in FAMILIES}
    greedy = TESTED[0].text
    assert judge({}, every)[greedy].verdict == "met"
    assert judge({}, {**every, test.format("llama"): "failed"})[greedy].verdict == "missed"
    assert judge({}, {**every, test.format("gpt2"): "skipped"})[greedy].found == "no test of gpt2"
    nothing = judge({}, {})
    assert {goal.verdict for goal in nothing.values()} == {"not measured"}
    assert len(nothing) == len(TESTED) + len(TARGETS)


def test_outcomes_of_pytest_are_written_one_by_one(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\ndef test_good(): pass\ndef test_bad(): assert False\n"
        "@pytest.mark.skip\ndef test_skipped(): pass\ndef test_killed(): os._exit(9)\n"
    )
    outcomes = tmp_path / "outcomes"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.gpu_check.outcomes", "-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environment = {**own, "PYTHONPATH": str(ROOT), "OUTCOMES": str(outcomes)}
    subprocess.run([*command, "."], cwd=tmp_path, env=environment, capture_output=True, check=False)
    found = {name.split("::")[1]: outcome for name, outcome in read_outcomes(outcomes).items()}
    assert found == {"test_good": "passed", "test_bad": "failed", "test_skipped": "skipped"}


def test_a_lease_that_ends_leaves_a_result(tmp_path):
    """SIGTERM, as `timeout` sends it: no step is left behind, and what was known is written."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--stage", "1", "--output", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "machine" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "interrupted" in rest and "wrote " in rest
    [file] = tmp_path.glob("*/*.json")
    assert json.loads(file.read_text())["steps"]["machine"]["state"] == "interrupted"
