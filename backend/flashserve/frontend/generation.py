"""One request's state in the stub, from its parsing to its FINAL flag."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

from flashserve.errors import FlashserveError
from flashserve.frontend.request_parser import ParsedRequest
from flashserve.protocol import PromptProgress, RequestTimings, TokenOutput
from flashserve.text.completion import Completion


class Inbox:
    """What waits for a request's sender thread: the engine's outputs, and errors from whoever has one. Any thread puts,
    that one takes; outputs pile up here while it is busy, and then leave together."""

    def __init__(self) -> None:
        self._items: deque[TokenOutput | FlashserveError] = deque()
        self._announced = False
        self.failed = False
        """An error was put."""

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: TokenOutput | FlashserveError) -> None:
        self._items.append(item)
        if isinstance(item, FlashserveError):
            self.failed = True

    def announce(self) -> bool:
        """Whether the taker must be told that there is something: once, and then it takes all there is."""
        announced, self._announced = self._announced, True
        return not announced

    def take(self) -> Iterator[TokenOutput | FlashserveError]:
        """All items, in their order, and those that come meanwhile."""
        self._announced = False  # before the first look: what is put after the last one is announced again
        while self._items:
            yield self._items.popleft()


class Generation:
    """Fields are grouped by the one thread that writes them; others may read them."""

    def __init__(self, parsed: ParsedRequest, sender: Any, completions: list[Completion]) -> None:
        """``sender``: Triton's response sender. ``completions``: one for each sample."""
        self.parsed = parsed
        self.message = parsed.message
        self.id = parsed.message.request_id
        self.sender = sender
        self.inbox = Inbox()

        # The engine's thread:
        self.token_times: list[float | None] = [None] * len(completions)
        """When each sample had its last token."""

        # The request's sender thread:
        self.completions = completions
        self.progress: PromptProgress | None = None
        """How far the prompt is, until a response has said it."""
        self.last_sent = self.message.arrival
        self.closed = False
        """FINAL was sent; nothing may follow."""
        self._closing = threading.Lock()

        # The cancellation watcher:
        self.cancelled = False
        self.last_keep_alive = self.message.arrival

    @property
    def last_token_time(self) -> float | None:
        return max((time for time in self.token_times if time is not None), default=None)

    @property
    def num_tokens(self) -> int:
        """Generated, of all samples."""
        return sum(len(completion.token_ids) for completion in self.completions)

    @property
    def timings(self) -> RequestTimings | None:
        """The newest ones."""
        known = [completion.timings for completion in self.completions if completion.timings is not None]
        return max(known, key=lambda timings: timings.last_token or 0.0, default=None)

    @property
    def has_news(self) -> bool:
        """Whether the next response has text, or says how far the prompt is."""
        return self.progress is not None or any(completion.has_text for completion in self.completions)

    def take_progress(self) -> PromptProgress | None:
        """For the next response: each is told once."""
        progress, self.progress = self.progress, None
        return progress

    @property
    def name(self) -> str:
        """For the log: the client's id if it gave one."""
        return self.parsed.request_id or f"#{self.id}"

    def client_is_gone(self) -> bool:
        """Ask Triton, a round trip. False once closed: with FINAL, Triton frees what it would look at."""
        with self._closing:
            return not self.closed and self.sender.is_cancelled()

    def close(self) -> None:
        """To be called before FINAL is sent. Waits for a question to Triton that is under way."""
        with self._closing:
            self.closed = True
