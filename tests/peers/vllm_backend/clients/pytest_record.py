"""What sitecustomize.py does for unittest, as a plugin of pytest."""

import json
import os


def pytest_runtest_makereport(item, call):
    if call.when != "call" and call.excinfo is None:
        return
    outcome = "passed" if call.excinfo is None else "failed" if call.when == "call" else "error"
    name = item.nodeid.split("::", 1)[1].replace("::", ".")
    with open(os.environ["VLLM_SUITE_RESULTS"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": name, "outcome": outcome, "text": _text(call.excinfo)}) + "\n")


def _text(raised):
    """What was raised, and which error of Triton's it is about: its representation alone says nothing."""
    if raised is None:
        return ""
    error = raised.traceback[-1].frame.f_locals.get("error")
    return f"{raised.exconly()}\n{error or ''}"
