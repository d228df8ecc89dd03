"""Paths with any character, also in a process whose file system encoding is ASCII.

That is so in Triton's stub, whatever LANG says: its embedded Python is isolated from the environment. Such a process
spells what is not ASCII with surrogates, which no other program and no message understands.
"""

from __future__ import annotations

import os
from pathlib import Path


def native(path: str | os.PathLike[str]) -> Path:
    """A path in this process's own spelling, for its own file functions. Idempotent."""
    return Path(os.fsdecode(os.fspath(path).encode("utf-8", "surrogateescape")))


def absolute(path: Path) -> Path:
    """The same place from the root. A file that is a link keeps its name, which says what it is and which others belong
    to it: in the cache of the Hugging Face hub every file is a link to one that is named by a hash."""
    return path.resolve() if path.is_dir() else path.parent.resolve() / path.name


def portable(path: str | os.PathLike[str]) -> str:
    """The same as text for others: messages, libraries that open files themselves, other processes. Idempotent."""
    return os.fsencode(native(path)).decode("utf-8", "surrogateescape")
