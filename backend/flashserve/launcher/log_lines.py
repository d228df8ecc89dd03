"""Lines of tritonserver, its stubs and their engines as JSON objects, for machines that collect logs."""

from __future__ import annotations

import json
import re
from datetime import datetime, timezone
from typing import Any

LEVELS = {"D": "debug", "I": "info", "W": "warning", "E": "error", "F": "critical", "C": "critical"}
# I1127 08:16:36.416084 4255 server.cc:345] "successfully unloaded 'm' version 1"
TRITON = re.compile(r"^(?P<level>[IWEF])(?P<time>\d{4} [\d:.]+) (?P<thread>\d+) (?P<source>[^\]]+)\] (?P<message>.*)$")
# 2026-11-27 08:16:35,735 I engine[m] ready after 1.2 s
OURS = re.compile(
    r"^(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (?P<level>[DIWEC]) (?P<source>\w+\[[^\]]*\]|\S+) (?P<message>.*)$"
)
REQUEST = re.compile(r"^request (?P<fields>\w+=\S*(?: \w+=\S*)*)$")  # frontend/request_log.py
TEXTS = ("id", "reason")
NUMBER = re.compile(r"-?\d{1,15}(\.\d{1,6})?")
WARNING = re.compile(r"^\[warn\] ")


def as_json(line: str) -> str:
    """A line of log as a line of JSON: time (ISO 8601, UTC), level, source, message; a request's fields beside it."""
    return json.dumps(parse(line), ensure_ascii=False)


def parse(line: str) -> dict[str, Any]:
    """What a line says. One of no known form has the time at which it was read, and no source."""
    for pattern, time_of in ((TRITON, _triton_time), (OURS, _our_time)):
        match = pattern.match(line)
        if match is None:
            continue
        try:
            time = time_of(match["time"])
        except ValueError:  # the 99th of a month: some library's line that only looks like ours
            continue
        return {**_message(match["message"]), "time": time, "level": LEVELS[match["level"]], "source": match["source"]}
    level = "warning" if WARNING.match(line) else "info"
    return {"time": _iso(datetime.now(timezone.utc)), "level": level, "source": "", "message": line}


def said(message: str, level: str = "info") -> str:
    """A line of the launcher's own."""
    entry = {"time": _iso(datetime.now(timezone.utc)), "level": level, "source": "launcher", "message": message}
    return json.dumps(entry, ensure_ascii=False)


def _message(text: str) -> dict[str, Any]:
    if text.startswith('"') and text.endswith('"'):  # Triton quotes, as a JSON string
        try:
            text = json.loads(text, strict=False)
        except ValueError:
            text = text[1:-1]
    request = REQUEST.match(text)
    if request is None:
        return {"message": text}
    fields = dict(field.split("=", 1) for field in request["fields"].split(" "))
    return {**{name: _value(name, value) for name, value in fields.items()}, "message": "request"}


def _value(name: str, value: str) -> str | int | float:
    """A number where the field is one; a client's id stays text, whatever it looks like."""
    if name in TEXTS or not NUMBER.fullmatch(value):
        return value
    return float(value) if "." in value else int(value)


def _triton_time(text: str) -> str:
    """Triton's times have no year, and are local."""
    now = datetime.now()
    found = datetime.strptime(f"{now.year} {text}", "%Y %m%d %H:%M:%S.%f")
    if found > now.replace(microsecond=999_999) and found.month == 12 and now.month == 1:  # written last year
        found = found.replace(year=now.year - 1)
    return _iso(found.astimezone(timezone.utc))


def _our_time(text: str) -> str:
    return _iso(datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").astimezone(timezone.utc))


def _iso(time: datetime) -> str:
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
