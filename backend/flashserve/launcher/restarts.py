"""How often a tritonserver that failed is started anew, and after which pause."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

DEFAULT_MAX_RESTARTS = 5
# A loaded machine lets an answer of a millisecond wait for seconds, not for a minute.
DEFAULT_ANSWER_TIMEOUT_S = 60.0
BACKOFF_S = (0.5, 2.0, 5.0, 15.0, 60.0)
STABLE_AFTER_S = 600.0  # one that served for so long has overcome what was wrong; failures are counted anew
# A model that fails to load in so many starts in a row is left out, so that the others serve again.
LOAD_FAILURES = 2


class Restarts:
    """Counts the failures that came close together."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._clock = clock
        self._failures = 0
        self._load_failures: dict[str, int] = {}

    def pause_s(self, ready_for_s: float) -> float | None:
        """To be called at each failure, with the time that it had served until then. None: no further start."""
        if ready_for_s >= STABLE_AFTER_S:
            self._failures = 0
        self._failures += 1
        if self._failures > self._limit:
            return None
        return BACKOFF_S[min(self._failures, len(BACKOFF_S)) - 1]

    @property
    def summary(self) -> str:
        """For the last message."""
        if self._limit == 0:
            return "and it is not to be started anew (--max-restarts 0)"
        return f"and starting it anew did not help {self._limit} times (--max-restarts {self._limit})"

    def given_up(self, failures: Mapping[str, str]) -> list[str]:
        """The models that are to be left out of the next start, given those that failed to load in this one."""
        self._load_failures = {name: self._load_failures.get(name, 0) + 1 for name in failures}
        return [name for name, count in self._load_failures.items() if count >= LOAD_FAILURES]
