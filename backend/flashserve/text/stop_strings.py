"""Stop strings in a stream of text: found across any boundaries, holding back no more than needed."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=1024)
def _borders(stop: str) -> array[int]:
    """Knuth-Morris-Pratt's table: for each prefix, the length of its longest proper border."""
    table = array("I", [0]) * len(stop)
    k = 0
    for i in range(1, len(stop)):
        while k and stop[i] != stop[k]:
            k = table[k - 1]
        if stop[i] == stop[k]:
            k += 1
        table[i] = k
    return table


def _advance(stop: str, k: int, text: str, i: int = 0) -> tuple[int, int]:
    """Read ``text`` from ``i`` on, with ``k`` characters of ``stop`` already matched.

    Returns (how many match at the end of what was read, where a full match ends in ``text`` or -1).
    """
    borders = _borders(stop)
    n, first = len(stop), stop[0]
    while i < len(text):
        if k == 0:
            # In most text nothing matches: one C call then skips a token, or all of it.
            i = text.find(first, i)
            if i < 0:
                return 0, -1
            k = 1
        else:
            c = text[i]
            while k and stop[k] != c:
                k = borders[k - 1]
            if stop[k] == c:
                k += 1
        i += 1
        if k == n:
            return borders[n - 1], i
    return k, -1


class StopStringMatcher:
    """Finds the first of several stop strings in text that arrives in pieces.

    The match that ends first wins, and of those the longest: this does not depend on how the text was cut into
    pieces, nor does it need to look ahead. The cost is linear in the text, whatever the stop strings are.
    """

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        """``include``: a found stop string is part of the emitted text."""
        self._stop = tuple(stop)
        self._include = include
        firsts = "".join(re.escape(string[0]) for string in self._stop)
        self._may_start = re.compile(f"[{firsts}]" if firsts else r"(?!)").search
        self._matched = [0] * len(self._stop)
        """Per stop string, how many of its characters the text so far ends in."""
        self._held = ""
        """The end of the text that may be the start of a stop string."""

    def feed(self, text: str, allowed: bool = True) -> tuple[str, bool]:
        """Take more text; returns (what may be shown, whether a stop string was completed).

        While not ``allowed``, completed stop strings are text like any other. After a match feed nothing more.
        """
        if not self._held and not self._may_start(text):
            return text, False  # nearly every token; 0.2 us instead of 0.5 us per stop string
        end, longest = len(text) + 1, 0
        for index, stop in enumerate(self._stop):
            k, found = _advance(stop, self._matched[index], text)
            while found >= 0 and not allowed:
                k, found = _advance(stop, k, text, found)
            self._matched[index] = k
            if 0 <= found < end or (found == end and len(stop) > longest):
                end, longest = found, len(stop)
        whole = self._held + text
        if longest:
            end += len(self._held)
            return whole[: end if self._include else end - longest], True
        keep = max(self._matched, default=0)
        cut = len(whole) - keep
        self._held = whole[cut:]
        return whole[:cut], False

    def finish(self) -> str:
        """The text has ended: what was held back is text after all."""
        held, self._held = self._held, ""
        return held
