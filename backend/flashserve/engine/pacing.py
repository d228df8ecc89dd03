"""How many prompt tokens a step may take while others decode, from what the steps before took.

A prompt's tokens make the step longer in which they are computed, and everybody who decodes waits for it: 512 tokens
of a 135M model beside 16 decodes made a gap of 75 ms between tokens that otherwise came every 20 ms. The prompt's share
is cut so that such a step takes at most ``STRETCH`` times a step of decodes alone. Where the engine waits while the
device computes, its own clock measures a step; a device that runs behind the engine says itself what it took.
"""

from __future__ import annotations

from flashserve.scheduling.output import SchedulerOutput

STRETCH = 6.0
"""A busy server on a CPU merges two tokens per response, so such a step is about three times the usual gap between
responses. A burst of 16 requests gave 640 tokens per second with it and gaps of 2.1 medians at the 99th percentile, 626
and 1.7 with 4, no more tokens without a limit, and 12% fewer with 2.25. Where steps are too long to merge anything (16
decodes in 40 ms or more), a gap beside a prompt is up to six of the others."""
MIN_TOKENS = 64
"""A prompt goes on by at least this much, however slow: fewer rows do not fill the matrix units."""
_SMOOTHING = 0.2


class PrefillPacing:
    """Learns two times: a step of decodes, and a prompt's token."""

    def __init__(self, budget: int) -> None:
        """budget: a step's tokens, the limit until both times are known."""
        self._budget = budget
        self._decode_s = 0.0
        self._token_s = 0.0

    def observe(self, plan: SchedulerOutput, seconds: float) -> None:
        """Take note of a finished step."""
        decodes = sum(row.num_tokens == 1 for row in plan.rows)  # or a prompt's last token, which takes as long
        prompt_tokens = plan.num_tokens - decodes
        if not prompt_tokens:
            self._decode_s = _smoothed(self._decode_s, seconds)
        elif prompt_tokens >= MIN_TOKENS:
            self._token_s = _smoothed(
                self._token_s, max(0.0, seconds - (self._decode_s if decodes else 0)) / prompt_tokens
            )

    def limit(self) -> int:
        """Prompt tokens of a step that also decodes."""
        if not self._decode_s or not self._token_s:
            return self._budget
        return min(self._budget, max(MIN_TOKENS, int((STRETCH - 1) * self._decode_s / self._token_s)))


def _smoothed(average: float, value: float) -> float:
    return value if not average else average + _SMOOTHING * (value - average)
