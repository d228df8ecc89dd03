"""Writes down what unittest finds out: one JSON line per test to the file that VLLM_SUITE_RESULTS names.

Python imports it in every interpreter that has this folder in PYTHONPATH: the suite's scripts, not their server. The
suite's own logs are overwritten from run to run and of different kinds.
"""

import json
import os
import unittest


def _record(name, outcome):
    original = getattr(unittest.TextTestResult, name)

    def method(self, test, detail=None):
        text = self._exc_info_to_string(detail, test) if isinstance(detail, tuple) else detail or ""
        line = json.dumps({"test": test.id().removeprefix("__main__."), "outcome": outcome, "text": text})
        with open(os.environ["VLLM_SUITE_RESULTS"], "a", encoding="utf-8") as file:
            file.write(line + "\n")
        return original(self, test) if detail is None else original(self, test, detail)

    setattr(unittest.TextTestResult, name, method)


if "VLLM_SUITE_RESULTS" in os.environ:
    for _name, _outcome in (
        ("addSuccess", "passed"),
        ("addFailure", "failed"),
        ("addError", "error"),
        ("addSkip", "skipped"),
    ):
        _record(_name, _outcome)
