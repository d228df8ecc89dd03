"""Lines of log as JSON objects: what is kept of each kind."""

import calendar
import io
import json
import time
from datetime import datetime

import pytest

from flashserve.launcher.console import Console
from flashserve.launcher.log_lines import as_json, parse


@pytest.mark.parametrize(
    ("line", "level", "source", "message"),
    [
        ('I1127 08:16:36.416084 4255 server.cc:345] "Timeout 29: Found"', "info", "server.cc:345", "Timeout 29: Found"),
        ('E0101 00:00:00.000001 7 m.cc:1] "it\\nsaid \\"no\\""', "error", "m.cc:1", 'it\nsaid "no"'),
        ("W1127 08:16:36.416084 4255 a.cc:1] plain", "warning", "a.cc:1", "plain"),
        ("2026-11-27 08:16:35,735 I engine[m] ready after 1.2 s: x", "info", "engine[m]", "ready after 1.2 s: x"),
        ("2026-11-27 08:16:35,735 C stub[m] gone", "critical", "stub[m]", "gone"),
        ("[warn] Error from accept() call", "warning", "", "[warn] Error from accept() call"),
        ("  File x, line 3", "info", "", "  File x, line 3"),
        ("", "info", "", ""),
    ],
)
def test_a_line_of_each_kind(line, level, source, message):
    entry = json.loads(as_json(line))
    assert (entry["level"], entry["source"], entry["message"]) == (level, source, message)
    assert datetime.fromisoformat(entry["time"].replace("Z", "+00:00")).tzinfo is not None


@pytest.fixture
def tokyo(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_times_are_utc(tokyo):
    assert parse("2026-11-27 08:16:35,735 I engine[m] x")["time"] == "2026-11-26T23:16:35.735Z"
    year = datetime.now().year
    assert parse("I0301 08:16:36.416084 7 a.cc:1] x")["time"] == f"{year}-02-{28 + calendar.isleap(year)}T23:16:36.416Z"


@pytest.mark.parametrize(
    "line",
    [
        "2026-11-27 08:16:35 I foo bar",
        "2026-13-99 08:16:35,735 I foo bar",
        "I1399 08:16:36.416084 4255 a.cc:1] x",
        "I0230 08:16:36.416084 4255 a.cc:1] x",
        'I1127 08:16:36.416084 4255 a.cc:1] "not \\x json"',
    ],
)
def test_a_line_that_only_looks_like_one_is_kept_as_it_is(line):
    """An exception here would end the thread that empties tritonserver's pipe."""
    entry = json.loads(as_json(line))
    assert entry["message"] in (line, "not \\x json")


def test_a_folders_name_may_have_blanks():
    entry = parse("2026-11-27 08:16:35,735 I engine[my model] ready after 1 s")
    assert (entry["source"], entry["message"]) == ("engine[my model]", "ready after 1 s")


def test_a_clients_id_stays_what_it_is():
    for given in ("nan", "1e999", "007", "12", "time=3"):
        entry = json.loads(as_json(f"2026-11-27 08:16:35,735 I stub[m] request id={given} reason=stop prompt_tokens=3"))
        assert (entry["id"], entry["prompt_tokens"]) == (given, 3)


def test_a_request_becomes_fields_with_numbers_as_numbers():
    line = "2026-11-27 08:16:35,735 I stub[m] request id=a-1 reason=stop prompt_tokens=3 ttft_ms=1.25"
    entry = parse(line)
    wanted = {"message": "request", "id": "a-1", "reason": "stop", "prompt_tokens": 3, "ttft_ms": 1.25}
    assert wanted.items() <= entry.items()
    assert parse("2026-11-27 08:16:35,735 E stub[m] request a failed in it")["message"] == "request a failed in it"


def test_the_launchers_own_lines_are_objects_too():
    stream = io.StringIO()
    console = Console(stream, as_json=True)
    console.say("  HTTP     http://localhost:8000")
    console.fail("it is broken", "mend it")
    console.show_log("2026-11-27 08:16:35,735 I engine[m] é")
    said, failed, shown = map(json.loads, stream.getvalue().splitlines())
    assert (said["source"], said["message"]) == ("launcher", "HTTP     http://localhost:8000")
    assert (failed["level"], failed["message"]) == ("error", "it is broken; mend it")
    assert shown["message"] == "é"
