"""What the GPU path should reach, and what a run says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.report import TARGETS, Target, Verdict

NOT_MEASURED = Verdict("not measured")


@dataclass(frozen=True)
class Tested:
    """A goal that tests decide: all of those that a pattern finds ran, and none failed."""

    text: str
    pattern: str
    groups: tuple[str, ...] = ("",)
    """Each must be in the name of one of them, or the goal counts as not measured."""

    def judge(self, outcomes: Mapping[str, str]) -> Verdict:
        found = {name: outcome for name, outcome in outcomes.items() if re.search(self.pattern, name)}
        failed = [name for name, outcome in found.items() if outcome == "failed"]
        if failed:
            return Verdict("missed", f"{len(failed)} of {len(found)} failed: {failed[0]}")
        passed = [name for name, outcome in found.items() if outcome == "passed"]
        lacking = [group for group in self.groups if not any(group in name for name in passed)]
        if lacking:
            return Verdict("not measured", f"no test of {', '.join(filter(None, lacking))}" if passed else "")
        return Verdict("met", f"{len(passed)} tests")


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "gpt2")
"""tests/support/tiny_models.FAMILIES, which need transformers; a test holds these to them."""
TESTED = (
    Tested("greedy tokens are the reference's, every family", r"test_greedy\.py::test_(float32|16_bits)", FAMILIES),
    Tested("tokens of captured steps are those of eager ones", r"test_engine\.py::.*(graphs|chunks)"),
    Tested("nothing is compiled after the start", r"test_nothing_is_compiled_after_the_start"),
)


def judge(sections: Mapping[str, Mapping[str, Any]], outcomes: Mapping[str, str]) -> dict[str, Verdict]:
    """A verdict on each goal by its text, from the figures of benchmarks.gpu and the outcomes of tests."""
    tested = {goal.text: goal.judge(outcomes) for goal in TESTED}
    return tested | {target.text: target.judge(sections) for target in TARGETS}


__all__ = ["FAMILIES", "TESTED", "Target", "Tested", "Verdict", "judge"]
