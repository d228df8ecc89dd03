"""The metadata of a GGUF file by key, each value of the type that its reader expects."""

from __future__ import annotations

import hashlib
import math
from typing import Any, TypeVar

from flashserve.errors import ConfigError
from flashserve.models.gguf.header import MAX_VALUES, GgufArray, GgufHeader

T = TypeVar("T")


class Metadata:
    """Of a model's first file, which holds all of it. Every getter raises ConfigError that names file and key."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self._read: set[str] = set()
        self.name = header.file.name

    def __contains__(self, key: str) -> bool:
        return key in self._header.values

    def keys(self, prefix: str) -> list[str]:
        """Those that begin so."""
        return [key for key in self._header.values if key.startswith(prefix)]

    def unread(self, prefix: str) -> list[str]:
        """Keys that begin so and for which no getter was called, sorted."""
        return sorted(key for key in self.keys(prefix) if key not in self._read)

    def text(self, key: str, default: str | None = None) -> str:
        return self._get(key, default, str, "a string")

    def flag(self, key: str, default: bool) -> bool:
        return self._get(key, default, bool, "true or false")

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        """An array of equal values is one value: some writers give one for each layer."""
        value = self._scalar(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise ConfigError(f"{self.name} lacks {key}")
        if type(value) is not int or value < minimum:
            raise self.error(key, f"must be an integer of at least {minimum}", value)
        return value

    def number(self, key: str, default: float | None = None, *, may_be_zero: bool = False) -> float:
        """A positive one, or 0 where it may be that."""
        value = self._header.values.get(key, default)
        self._read.add(key)
        if value is None:
            raise ConfigError(f"{self.name} lacks {key}")
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0 or not (value or may_be_zero):
            raise self.error(key, f"must be a positive number{' or 0' if may_be_zero else ''}", value)
        return float(value)

    def count(self, key: str) -> int:
        """Values of an array, which are not looked at."""
        return self._get(key, None, GgufArray, "an array").count

    def strings(self, key: str) -> list[str]:
        values = self._array(key)
        if values and not isinstance(values[0], str):
            raise self.error(key, "must be an array of strings", values[0])
        return values

    def numbers(self, key: str) -> list[Any]:
        values = self._array(key)
        if values and isinstance(values[0], str):
            raise self.error(key, "must be an array of numbers", values[0])
        return values

    def digest(self, prefix: str) -> str:
        """A hash of all keys that begin so, with their values as they stand in the file."""
        digest = hashlib.sha256()
        for key in self.keys(prefix):
            begin, end = self._header.spans[key]
            digest.update(self._header.memory[begin:end])
        return digest.hexdigest()

    def error(self, key: str, reason: str, value: Any) -> ConfigError:
        """For a value that makes no sense."""
        shown = "an array" if isinstance(value, GgufArray) else repr(value)[:100]
        return ConfigError(f"{self.name}: {key} {reason}, not {shown}")

    def _get(self, key: str, default: T | None, kind: type[T], words: str) -> T:
        value = self._header.values.get(key, default)
        self._read.add(key)
        if value is None:
            raise ConfigError(f"{self.name} lacks {key}")
        if not isinstance(value, kind):
            raise self.error(key, f"must be {words}", value)
        return value

    def _scalar(self, key: str) -> Any:
        value = self._header.values.get(key)
        self._read.add(key)
        if not isinstance(value, GgufArray):
            return value
        if value.count > MAX_VALUES:  # of tensors, and there are more of them than layers
            raise self.error(key, "must be one value, or one for each layer", value)
        values = set(self._header.array(key))
        if len(values) != 1:
            raise self.error(key, "must be the same for all layers", sorted(values))
        return values.pop()

    def _array(self, key: str) -> list[Any]:
        self.count(key)
        return self._header.array(key)
