"""How far the loading of weights is: a bar on a terminal, a line in a log now and then."""

from __future__ import annotations

import logging
import sys
import time

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_EVERY_S = 3.0  # a model that loads faster logs nothing


class LoadingProgress:
    """Counts bytes up to a total that may not be reached (tensors that the model does not need)."""

    def __init__(self, total_bytes: int) -> None:
        self._total = max(1, total_bytes)
        self._done = 0
        self._logged = time.monotonic()
        on_terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(
            total=total_bytes, desc="loading weights", unit="B", unit_scale=True, leave=False, disable=not on_terminal
        )

    def advance(self, num_bytes: int) -> None:
        """Count bytes that were read; a tied table is read twice, and counts once."""
        num_bytes = min(num_bytes, self._total - self._done)
        self._done += num_bytes
        self._bar.update(num_bytes)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            log.info("loading weights: %d%% of %.1f GB", 100 * self._done // self._total, self._total / 1e9)

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        self._bar.close()
