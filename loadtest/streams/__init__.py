"""One request over a protocol, in calls that block a greenlet and never the process."""

from __future__ import annotations

from .base import Ask, Stream
from .choose import parse_target, stream_for

__all__ = ["Ask", "Stream", "parse_target", "stream_for"]
