"""How the runner of the vLLM backend's tests judges what it sees, and what it changes in them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "peers" / "vllm_backend"))
import results
import rewrite
from reference import Continuation
from results import Outcome, ScriptRun
from suites import ExpectedFailure, ExpectedTest, Step, Suite
from weights import SetupError

REFUSED = ExpectedFailure("n > 1", r"n='2' is not supported")
SUITE = Suite(
    "s",
    "ci/s",
    (ExpectedTest("C.test_a"), ExpectedTest("C.test_n", failure=REFUSED)),
    steps=(Step("loads", "no load"),),
)
END = "***\n*** vLLM test FAILED. \n***\n"
PASSED = Outcome("C.test_a", "passed", "")
FAILED = Outcome("C.test_n", "failed", "Traceback\n  code\nAssertionError: n='2' is not supported\n")


def judge(*outcomes: Outcome, exit_code: int | None = 1, stdout: str = END, suite: Suite = SUITE) -> dict[str, bool]:
    rows = results.judge(suite, ScriptRun(exit_code, stdout, outcomes, ()))
    return {row.name: row.as_expected for row in rows}


def test_all_as_expected() -> None:
    assert judge(PASSED, FAILED) == {"test_a": True, "test_n": True, "loads": True, "the script, to its end": True}


def test_an_expected_failure_that_passes_is_wrong() -> None:
    assert not judge(PASSED, Outcome("C.test_n", "passed", ""))["test_n"]


def test_an_expected_failure_for_another_reason_is_wrong() -> None:
    # The pattern stands in the code that the traceback shows, not in what was raised.
    text = "Traceback\n    look_for('n=\\'2\\' is not supported')\nTimeoutError: late\n"
    assert not judge(PASSED, Outcome("C.test_n", "error", text))["test_n"]


def test_a_failure_that_nobody_expects_is_wrong() -> None:
    assert not judge(Outcome("C.test_a", "error", "ValueError: x"), FAILED)["test_a"]


def test_a_test_that_did_not_run_is_wrong_and_so_is_one_that_nobody_knows() -> None:
    rows = judge(FAILED, Outcome("C.test_new", "passed", ""))
    assert (rows["test_a"], rows["C.test_new"]) == (False, False)


def test_a_script_that_did_not_reach_its_end_takes_its_steps_along() -> None:
    rows = judge(PASSED, FAILED, exit_code=None, stdout="")
    assert (rows["loads"], rows["the script, to its end"]) == (False, False)


def test_a_script_that_complains_of_a_step() -> None:
    assert not judge(PASSED, FAILED, stdout="no load\n" + END)["loads"]


def test_a_script_that_fails_though_its_tests_pass() -> None:
    suite = Suite("s", "ci/s", (ExpectedTest("C.test_a"),))
    assert not judge(PASSED, suite=suite)["the script, to its end"]
    assert judge(PASSED, exit_code=0, suite=suite)["the script, to its end"]


def test_cases_of_a_parametrised_test_are_counted() -> None:
    suite = Suite(
        "s", "ci/s", (ExpectedTest("C.test_a", cases="x-.*", count=2), ExpectedTest("C.test_a", "rest", cases=".*"))
    )
    outcomes = [Outcome(f"C.test_a[{case}]", "passed", "") for case in ("x-1", "y-1", "x-2")]
    assert judge(*outcomes, suite=suite)["test_a, 2 cases"]
    assert not judge(*outcomes[:2], suite=suite)["test_a, 2 cases"]


def complete(prompt: str) -> Continuation:
    return Continuation(7, (" new", "."), "length")


def changed(tmp_path: Path, changes: rewrite.Changes, source: str) -> str:
    path = tmp_path / "test.py"
    path.write_text(source, encoding="utf-8")
    rewrite.rewrite(path, changes, complete)
    return path.read_text(encoding="utf-8")


def test_texts_keep_or_drop_the_prompt_as_they_did(tmp_path: Path) -> None:
    source = 'def test(self):\n    prompts = ["é"]\n    expected_output = [\n        {}.encode()\n    ]\n'
    for old, new in (('b"ab old"', "[b'ab new.']"), ('b" old"', "[b' new.']")):
        text = source.replace("{}.encode()", old).replace("é", "ab")
        assert changed(tmp_path, rewrite.whole_texts, text).endswith(f"expected_output = {new}\n")


def test_only_lists_of_streamed_texts_change(tmp_path: Path) -> None:
    source = 'PROMPTS = ["é"]\nasync def a(self):\n    expected_output = [" old"]\nasync def b(self):\n    {}\n'
    source = source.format('expected_output = "an error"')
    assert changed(tmp_path, rewrite.streamed_texts, source) == source.replace('[" old"]', "[' new', '.']")


def test_only_the_counts_of_prompt_tokens_change(tmp_path: Path) -> None:
    source = (
        'def setUp(self):\n    self.prompts = ["é", "b"]\ndef test(self):\n'
        '    self.assertEqual(m["prompt_tokens_total"], 18 * self.n)\n'
        '    self.assertEqual(m["request_prompt_tokens_count"], total * self.n)\n'
        '    self.assertEqual(m["generation_tokens_total"], 48 * self.n)\n'
    )
    assert changed(tmp_path, rewrite.prompt_tokens, source) == source.replace("18", "14")


def test_a_suite_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="another version"):
        changed(tmp_path, rewrite.whole_texts, "def test(self):\n    pass\n")
