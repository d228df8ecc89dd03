"""`flashserve trace`: what an engine has just done, from a living engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from async_requests import engine_of
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.trace import EngineProcess, choose, find_engines, save_trace
from harness import Server
from requests_helper import generate


def test_an_engine_writes_its_last_steps_and_requests_and_goes_on(server: Server, tmp_path: Path) -> None:
    engine = EngineProcess(engine_of(server, "letters").pid, "letters")
    assert engine in find_engines()
    generate(server, model="letters", text_input="hello", max_tokens=17)
    save_trace(engine, tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event["ph"] == "X"]
    assert [step["args"]["tokens"] for step in steps[-17:]] == [3, *[1] * 16]
    last = [event["name"] for event in events if event["ph"] == "b"][-4:]
    assert (last[0].split()[0], last[1:]) == ("request", ["waits", "prefill", "decode"])
    assert generate(server, model="letters", text_input="hello", max_tokens=3)["text_output"]


def test_a_target_that_cannot_be_written_is_said(server: Server, tmp_path: Path) -> None:
    engine = EngineProcess(engine_of(server, "letters").pid, "letters")
    with pytest.raises(LauncherError, match="cannot write"):
        save_trace(engine, tmp_path / "none" / "trace.json")


def test_which_engines_are_meant() -> None:
    one, two, other = EngineProcess(1, "m"), EngineProcess(2, "m"), EngineProcess(3, "n")
    assert choose([one, two], None) == [one, two]
    assert choose([one, two, other], "n") == [other]
    for engines, model, words in (
        ([], None, "no engine runs"),
        ([one, other], None, "several models"),
        ([one], "x", "no engine serves x"),
    ):
        with pytest.raises(LauncherError, match=words):
            choose(engines, model)
