"""Files: what clients upload for their batches, and what batches answer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Container
from pathlib import Path
from typing import BinaryIO

from openai.types import FileObject

from ..errors import ApiError, invalid
from ..settings import Limits
from .records import Records

LIFETIME_S = 30 * 24 * 3600
"""OpenAI's, of files of batches for which nothing else is asked."""
SHORTEST_S, LONGEST_S = 3600, LIFETIME_S


class FileStore:
    """Each file is a record and its content beside it; a content without a record is no file."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        self._limits = limits
        self._records = Records(folder, FileObject)

    def load(self, awaited: Container[str]) -> None:
        """Reads what is there. Contents that belong to no file, and are not ``awaited`` (by id), go: an upload that did
        not end left them."""
        self._records.load()
        known = {file.id for _, file in self._records}
        for path in [*self._folder.glob("*.jsonl"), *self._folder.glob("*.part")]:
            if path.suffix == ".part" or (path.stem not in known and path.stem not in awaited):
                path.unlink(missing_ok=True)

    def path(self, file_id: str) -> Path:
        """Where its content is, or will be."""
        return self._folder / f"{file_id}.jsonl"

    def find(self, owner: str, file_id: str) -> FileObject:
        """Raises ApiError for one that is not there, not the owner's, or too old."""
        file = self._records.find(owner, file_id)
        if file is None or _is_over(file):
            raise ApiError(404, f"no file {file_id[:100]!r}", param="file_id", code="not_found")
        return file

    def of(self, owner: str) -> list[FileObject]:
        """The newest first."""
        return [file for file in self._records.of(owner) if not _is_over(file)]

    def check_room(self, owner: str, size: int) -> None:
        """Raises ApiError if the owner may not have so many bytes more."""
        files, limits = self.of(owner), self._limits
        if len(files) >= limits.files:
            raise invalid("file", f"a key may have {limits.files} files: delete some", "too_many_files")
        if sum(file.bytes for file in files) + size > limits.files_bytes:
            raise invalid("file", f"a key may have {limits.files_bytes} bytes in files: delete some", "too_many_files")

    async def add(self, owner: str, name: str, content: BinaryIO, lifetime_s: int = LIFETIME_S) -> FileObject:
        """A file that was uploaded. Raises ApiError, OSError."""
        file_id = f"file-{secrets.token_hex(12)}"
        size = await asyncio.to_thread(self._copy, content, file_id)
        try:
            self.check_room(owner, size)
            return await self.publish(owner, file_id, name, "batch", lifetime_s)
        except BaseException:
            with contextlib.suppress(OSError):
                self.path(file_id).unlink(missing_ok=True)
            raise

    async def publish(self, owner: str, file_id: str, name: str, purpose: str, lifetime_s: int) -> FileObject:
        """Makes a file of a content that is complete. Raises OSError."""
        now = int(time.time())
        file = FileObject.model_validate(
            {"id": file_id, "object": "file", "bytes": self.path(file_id).stat().st_size, "created_at": now,
             "filename": name, "purpose": purpose, "status": "processed", "expires_at": now + lifetime_s}
        )  # fmt: skip
        await self._records.put(owner, file)
        return file

    async def remove(self, file_id: str) -> None:
        """Raises OSError."""
        await self._records.remove(file_id)  # first: a record without content would be a file that cannot be read
        await asyncio.to_thread(self.path(file_id).unlink, missing_ok=True)

    async def remove_old(self, needed: Container[str]) -> None:
        """Those whose time is over, but for what unfinished batches need."""
        for _, file in self._records:
            if _is_over(file) and file.id not in needed:
                await self.remove(file.id)

    def _copy(self, content: BinaryIO, file_id: str) -> int:
        part = self._folder / f"{file_id}.part"
        try:
            with part.open("wb") as file:
                shutil.copyfileobj(content, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path(file_id))
        finally:
            part.unlink(missing_ok=True)
        return self.path(file_id).stat().st_size


def _is_over(file: FileObject) -> bool:
    return file.expires_at is not None and file.expires_at <= time.time()
