"""A home for processes of a user who has none: an unset HOME and a user id without an entry, as containers often have.

torch, transformers and the Hugging Face hub look for a home folder while they are imported, and fail without one.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flashserve.errors import ConfigError


def with_home(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, with HOME if neither it nor the system's list of users has one. Raises ConfigError."""
    if environment.get("HOME") or _is_listed():
        return dict(environment)
    name = f"flashserve-home-{os.getuid()}"
    home = Path(environment.get("TMPDIR") or tempfile.gettempdir(), name)
    try:
        home.mkdir(mode=0o700, exist_ok=True)
        found = home.lstat()
    except OSError as error:
        raise ConfigError(f"this user has no home folder, and none can be made: {error}; set HOME") from error
    # Compiled libraries are kept in it and loaded again: nobody else may have put one there.
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"this user has no home folder, and {home} is another user's or open to others; set HOME")
    # getpass asks these before the list of users.
    return {"LOGNAME": name, "USER": name, **environment, "HOME": str(home)}


def _is_listed() -> bool:
    try:
        Path.home()
    except (RuntimeError, KeyError):
        return False
    return True
