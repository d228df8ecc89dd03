"""A batch's lines: requests as they are read, answers as they are written."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from openai.types import BatchError

from ..incoming import is_nested_deeply
from ..settings import Limits

_MOST_ERRORS = 100
_LONGEST_ID = 512


@dataclass(frozen=True)
class BatchLine:
    """One request of a batch."""

    custom_id: str
    body: dict[str, Any]


def check_lines(path: Path, endpoint: str, limits: Limits) -> tuple[int, list[BatchError]]:
    """How many requests a file has, and the first hundred reasons for which it is no batch. Raises OSError."""
    seen: set[str] = set()
    errors: list[BatchError] = []
    number = 0
    for number, text in _texts(path, limits.body_bytes):
        line = _read(number, text, endpoint, limits.body_bytes)
        if isinstance(line, BatchLine) and line.custom_id in seen:
            line = _error("duplicate_custom_id", number, f"custom_id {line.custom_id!r} came before", "custom_id")
        if isinstance(line, BatchLine):
            seen.add(line.custom_id)
        else:
            errors.append(line)
        if len(seen) > limits.batch_lines:
            errors.append(_error("too_many_tasks", number, f"a batch has at most {limits.batch_lines} requests", None))
        if len(errors) >= _MOST_ERRORS or len(seen) > limits.batch_lines:
            break
    if not number:
        errors.append(_error("empty_file", None, "the file has no lines", None))
    return len(seen), errors


def read_lines(path: Path, endpoint: str, limits: Limits) -> Iterator[BatchLine]:
    """The requests of a file that was found right. Raises OSError."""
    for number, text in _texts(path, limits.body_bytes):
        line = _read(number, text, endpoint, limits.body_bytes)
        if isinstance(line, BatchLine):
            yield line


def _texts(path: Path, most: int) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, by number from 1; of those that are too long the beginning, and one byte too many."""
    with path.open("rb") as file:
        number = 0
        while text := file.readline(most + 1):
            number += 1
            rest = text
            while not rest.endswith(b"\n") and (rest := file.readline(most)):
                pass
            if text.strip():
                yield number, text


def _read(number: int, text: bytes, endpoint: str, most: int) -> BatchLine | BatchError:
    if len(text) > most:
        return _error("line_too_long", number, f"a line has at most {most} bytes", None)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return _error("invalid_json_line", number, f"not valid JSON: {error}", None)
    if not isinstance(value, dict) or is_nested_deeply(value):
        return _error("invalid_json_line", number, "must be a JSON object that is not nested deeply", None)
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= _LONGEST_ID:
        words = f"custom_id must be a string of 1 to {_LONGEST_ID} characters"
        return _error("invalid_custom_id", number, words, "custom_id")
    if value.get("method") != "POST":
        return _error("invalid_method", number, "method must be POST", "method")
    if value.get("url") != endpoint:
        return _error("mismatched_endpoint", number, f"url must be the batch's endpoint, {endpoint}", "url")
    if not isinstance(body, dict):
        return _error("invalid_body", number, "body must be an object", "body")
    if body.get("stream"):
        return _error("invalid_body", number, "body.stream: a batch has no streams", "body.stream")
    return BatchLine(custom_id, body)


def _error(code: str, line: int | None, message: str, param: str | None) -> BatchError:
    return BatchError(code=code, line=line, message=message, param=param)


class Journal:
    """Answers, appended to a file. What was added before a process was killed is there when it is opened again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: io.FileIO | None = None
        self._size = 0
        self.count = 0

    def open(self) -> set[str]:
        """Drops a line that was not written to its end; returns the ids of the others. Raises OSError."""
        self._file = self._path.open("ab", buffering=0)
        done: set[str] = set()
        with self._path.open("rb") as before:
            for text in before:
                if not text.endswith(b"\n"):
                    break
                done.add(orjson.loads(text)["custom_id"])
                self._size += len(text)
        self._file.truncate(self._size)
        self.count = len(done)
        return done

    def add(self, answer: dict[str, Any]) -> None:
        """One more. Raises OSError. Into the system's cache, which outlives this process: no thread is worth that."""
        assert self._file is not None
        text = orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE)
        try:
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size += len(text)
        self.count += 1

    def sync(self) -> None:
        """Puts all on the disk. Raises OSError."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leaves the file; one without an answer is removed."""
        if self._file is not None:
            self._file.close()
            self._file = None
            if not self.count:
                self._path.unlink(missing_ok=True)
