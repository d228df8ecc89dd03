"""Holds back lines that repeat: at its descriptor limit libevent writes one "[warn] accept" per failed try, a megabyte
a second."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

WINDOW_S = 1.0
# A line of its own in each of many tracebacks or requests is no flood yet; libevent's warnings never say more twice.
BURST = 10
WARNING_BURST = 1
WARNING = re.compile(r"^\[warn\] ")
# The times at the beginning of Triton's lines and of ours: E1127 08:16:36.416084 4255 and 2026-11-27 08:16:35,735
TIME = re.compile(r"^([DIWEFC]\d{4} [\d:.]+ \d+ |\d{4}-\d\d-\d\d [\d:,]+ )")


class FloodLimit:
    """Passes lines on, of those that are equal but for their time only the first few of each second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window = 0.0
        self._seen: dict[str, int] = {}
        """How often each line came in this window."""

    def admit(self, line: str) -> list[str]:
        """The lines to pass on now: this one or none, after the counts of a window that has just ended."""
        now = self._clock()
        passed = []
        if now - self._window >= WINDOW_S:
            passed = self.held()
            self._window = now
        text = TIME.sub("", line)
        self._seen[text] = count = self._seen.get(text, 0) + 1
        if count <= _burst(text):
            passed.append(line)
        return passed

    def held(self) -> list[str]:
        """A line about each that was held back since the last call."""
        counts, self._seen = self._seen, {}
        return [
            f"{text} [{count - _burst(text)} more of these within {WINDOW_S:.0f} s]"
            for text, count in counts.items()
            if count > _burst(text)
        ]


def _burst(text: str) -> int:
    return WARNING_BURST if WARNING.match(text) else BURST
