"""From what a run left to one row per test and step, each as expected or not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from suites import ExpectedFailure, ExpectedTest, Suite

from flashserve.launcher.process import FAILED

SHOWN_CHARACTERS = 200
# Every script ends by saying one of them.
VERDICT = re.compile(r"^\*\*\* .*\b(Passed|PASSED|FAILED)\b\.? *$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    suite: str
    name: str
    outcome: str
    """passed, failed, error, not run."""
    as_expected: bool
    remark: str = ""


@dataclass(frozen=True)
class Outcome:
    """Of one test, as the client's unittest recorded it."""

    test: str
    outcome: str
    text: str


@dataclass(frozen=True)
class ScriptRun:
    """What is known when a script has ended."""

    exit_code: int | None
    """None: it did not end in time."""
    stdout: str
    outcomes: tuple[Outcome, ...]
    leftovers: tuple[str, ...]
    """Processes that lived on."""


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """In the order in which the tests ran."""
    if not path.is_file():
        return ()
    return tuple(Outcome(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines())


def judge(suite: Suite, run: ScriptRun) -> list[Row]:
    """A row for every expected test, every other one that ran, and every step."""
    remaining = list(run.outcomes)
    rows = []
    for test in suite.tests:
        outcomes = [outcome for outcome in remaining if _matches(outcome.test, test)][: test.count]
        taken = set(map(id, outcomes))
        remaining = [outcome for outcome in remaining if id(outcome) not in taken]
        rows.append(_test_row(suite, test, outcomes))
    rows += [Row(suite.name, o.test, o.outcome, False, "not in the table of tests") for o in remaining]
    complete = _is_complete(suite, run)
    rows += [_step_row(suite, step.name, complete and step.complaint not in run.stdout) for step in suite.steps]
    rows.append(
        Row(suite.name, "the script, to its end", "passed" if complete else "failed", complete, _ending(run, complete))
    )
    if run.leftovers and run.exit_code is not None:
        rows.append(Row(suite.name, "nothing is left running", "failed", False, "; ".join(run.leftovers)))
    return rows


def table(rows: Sequence[Row]) -> str:
    """For people; what was not expected is marked."""
    headings = Row("suite", "test", "outcome", True, "")
    suite_width, name_width = (max(len(getattr(row, name)) for row in rows) for name in ("suite", "name"))
    lines = []
    for row in (headings, *rows):
        mark = " " if row.as_expected else "!"
        lines.append(
            f"{mark} {row.suite:<{suite_width}}  {row.name:<{name_width}}  {row.outcome:<8}  {row.remark}".rstrip()
        )
    return "\n".join(lines)


def _matches(name: str, test: ExpectedTest) -> bool:
    """``name`` may begin with a module, and end with parameters in brackets."""
    found = re.fullmatch(r"(?:\w+\.)*?(?P<test>\w+\.\w+)(?:\[(?P<case>.*)\])?", name)
    return (
        found is not None and found["test"] == test.name and re.fullmatch(test.cases, found["case"] or "") is not None
    )


def _test_row(suite: Suite, test: ExpectedTest, outcomes: Sequence[Outcome]) -> Row:
    """The first of the outcomes that is not as expected speaks for all."""
    name = test.name.split(".")[-1] + (f" ({test.note})" if test.note else "")
    if test.count > 1:
        name += f", {test.count} cases"
    if len(outcomes) < test.count:
        return Row(suite.name, name, "not run", False, f"{len(outcomes)} did" if outcomes else "")
    rows = [_outcome_row(suite, name, test.failure, outcome) for outcome in outcomes]
    wrong = [row for row in rows if not row.as_expected]
    if wrong and test.count > 1:
        return replace(wrong[0], remark=f"{len(wrong)} of them, one being: {wrong[0].remark}")
    return (wrong or rows)[0]


def _outcome_row(suite: Suite, name: str, failure: ExpectedFailure | None, outcome: Outcome) -> Row:
    if outcome.outcome == "passed":
        surprise = failure is not None
        return Row(suite.name, name, "passed", not surprise, "expected to fail: take it from the table" * surprise)
    if failure is None:
        return Row(suite.name, name, outcome.outcome, False, _first_line(outcome.text))
    if re.search(failure.pattern, _message(outcome.text)):
        return Row(suite.name, name, outcome.outcome, True, f"expected: {failure.reason}")
    return Row(suite.name, name, outcome.outcome, False, f"for another reason: {_first_line(outcome.text)}")


def _message(traceback: str) -> str:
    """What the exception says, without the lines of code above it, which name what they look for."""
    raised = re.search(r"^(?! |Traceback).*$", traceback, re.MULTILINE)
    return traceback[raised.start() :] if raised else traceback


def _first_line(text: str) -> str:
    lines = [line for line in _message(text).splitlines() if line.strip()]
    return lines[0][:SHOWN_CHARACTERS] if lines else ""


def _is_complete(suite: Suite, run: ScriptRun) -> bool:
    """The script reached its last line, and it is as content as its tests are."""
    all_passed = all(outcome.outcome == "passed" for outcome in run.outcomes)
    complained = any(step.complaint in run.stdout for step in suite.steps)
    reached = VERDICT.search(run.stdout) is not None
    return reached and run.exit_code is not None and (run.exit_code == 0 or not all_passed or complained)


def _step_row(suite: Suite, name: str, passed: bool) -> Row:
    return Row(suite.name, name, "passed" if passed else "failed", passed)


def _ending(run: ScriptRun, complete: bool) -> str:
    if run.exit_code is None:
        return "ended by the time limit"
    words = [f"exit code {run.exit_code}"] if run.exit_code else []
    if not complete and (failed := FAILED.search(run.stdout)):
        words.append(failed["reason"].split("\\n")[0][:SHOWN_CHARACTERS])
    return "; ".join(words)
