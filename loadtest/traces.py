"""Published traces: Azure's LLM inference traces and Mooncake's.

Azure      CSV    TIMESTAMP,ContextTokens,GeneratedTokens           dates and times
Mooncake   JSONL  {"timestamp", "input_length", "output_length", "hash_ids"}   ms; one id per 512 tokens
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class TracedRequest:
    at_s: float
    """From the trace's first request."""
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    """Equal ids: equal text, as long as all before are equal."""


@dataclass(frozen=True)
class Trace:
    requests: tuple[TracedRequest, ...]

    @property
    def seconds(self) -> float:
        """A hair beyond the last, which belongs to it."""
        return self.requests[-1].at_s + 1e-3

    def faster(self, speed: float) -> Trace:
        return Trace(tuple(replace(request, at_s=request.at_s / speed) for request in self.requests))


@lru_cache(maxsize=1)  # it is read to check the option and once more to use it
def read_trace(name: str) -> Trace:
    """By the file's first character. Raises ValueError with the line, or OSError."""
    path = Path(name)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = file.readline()
        file.seek(0)
        requests = list(_mooncake(file) if first.lstrip().startswith("{") else _azure(file))
    if not requests:
        raise ValueError(f"{name}: holds no request")
    requests.sort(key=lambda request: request.at_s)
    start = requests[0].at_s
    return Trace(tuple(replace(request, at_s=request.at_s - start) for request in requests))


def _azure(lines: Iterable[str]) -> Iterator[TracedRequest]:
    reader = csv.DictReader(lines)
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise ValueError(f"neither JSON lines nor a CSV with the columns {', '.join(_COLUMNS)}")
    for number, row in enumerate(reader, 2):
        try:
            time_text, prompt, output = (row[name] for name in _COLUMNS)
            # Seven digits of a second, which Python before 3.11 does not read.
            when = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", time_text.strip()))
            made = TracedRequest(when.replace(tzinfo=when.tzinfo or timezone.utc).timestamp(), int(prompt), int(output))
        except (ValueError, AttributeError, TypeError):
            raise ValueError(f"line {number}: {str(list(row.values()))[:100]} is no request") from None
        if made.prompt_tokens > 0 and made.output_tokens > 0:
            yield made


def _mooncake(lines: Iterable[str]) -> Iterator[TracedRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            blocks = tuple(int(block) for block in row.get("hash_ids", ()))
            made = TracedRequest(row["timestamp"] / 1000, int(row["input_length"]), int(row["output_length"]), blocks)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"line {number}: {line.strip()[:100]!r} is no request") from None
        if made.prompt_tokens > 0 and made.output_tokens > 0:
            yield made
