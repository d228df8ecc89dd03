"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("flashserve")
except PackageNotFoundError:  # run from its sources alone
    VERSION = "0"
