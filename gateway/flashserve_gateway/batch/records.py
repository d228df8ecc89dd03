"""Objects of the API as JSON files: one file each, written whole or not at all, all of them also in memory."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import orjson
from pydantic import BaseModel, ValidationError


class DataFolderError(OSError):
    """The data folder cannot be used; the message says why."""


class Named(Protocol):
    """What all kinds have."""

    id: str
    created_at: int


T = TypeVar("T", bound=Named)


def lock_folder(folder: Path) -> int:
    """Makes the folder, and it this process's until the descriptor that is returned is closed, or the process ends.
    Raises DataFolderError: two gateways would answer each line of a batch twice."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DataFolderError(f"the data folder {folder} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise DataFolderError(f"the data folder {folder} is used by another gateway") from None
    return lock


def write_whole(path: Path, content: bytes) -> None:
    """A file that has the new content or, whatever dies, the old one. The folder is written too: else a machine that
    loses its power could forget the new name, and with it an object that a client was told of."""
    draft = path.with_name(path.name + ".new")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Records(Generic[T]):
    """Objects of one kind, each of one key ("owner"). Whoever changes an object puts the new one here."""

    def __init__(self, folder: Path, kind: type[T]) -> None:
        self._folder = folder
        self._kind = kind
        self._values: dict[str, tuple[str, T]] = {}
        self._lock = asyncio.Lock()  # of two writes of one object, the later one stays

    def load(self) -> None:
        """Reads what is there. Raises DataFolderError for a file that this is not."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in self._folder.glob("*.json"):
            try:
                record = orjson.loads(path.read_bytes())
                assert issubclass(self._kind, BaseModel)
                value = self._kind.model_validate(record["value"])
                self._values[value.id] = (record["owner"], value)
            except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
                raise DataFolderError(f"{path} is not a record of this gateway: {error}") from None

    async def put(self, owner: str, value: T) -> None:
        """A new object, or one in the place of the old one. Raises OSError; it counts in memory at once."""
        self._values[value.id] = (owner, value)
        async with self._lock:
            if value.id in self._values:  # what is written is what it is by now
                await asyncio.to_thread(write_whole, self._path(value.id), self._encoded(value.id))

    async def remove(self, name: str) -> None:
        """Raises OSError."""
        self._values.pop(name, None)
        async with self._lock:
            await asyncio.to_thread(self._path(name).unlink, missing_ok=True)

    def find(self, owner: str, name: str) -> T | None:
        """One object, if it is the owner's."""
        found = self._values.get(name)
        return found[1] if found is not None and found[0] == owner else None

    def of(self, owner: str) -> list[T]:
        """The owner's, the newest first."""
        values = [value for its_owner, value in self._values.values() if its_owner == owner]
        return sorted(values, key=lambda value: (value.created_at, value.id), reverse=True)

    def __iter__(self) -> Iterator[tuple[str, T]]:
        """All, with their owners."""
        return iter(list(self._values.values()))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _encoded(self, name: str) -> bytes:
        owner, value = self._values[name]
        assert isinstance(value, BaseModel)
        return orjson.dumps({"owner": owner, "value": value.model_dump(mode="json")})
