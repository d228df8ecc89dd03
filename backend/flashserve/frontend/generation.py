"""One request's state in the stub, from its parsing to its FINAL flag."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

from flashserve.errors import FlashserveError
from flashserve.frontend.request_parser import ParsedRequest
from flashserve.protocol import RequestTimings, TokenOutput
from flashserve.text.output import TextStream


class Generation:
    """Written by its sender thread, except ``inbox`` (engine's thread appends) and the times beside it."""

    __slots__ = (
        "_closing",
        "cancelled",
        "closed",
        "failure",
        "id",
        "inbox",
        "last_sent",
        "last_token_time",
        "num_tokens",
        "num_tokens_sent",
        "parsed",
        "queued",
        "sender",
        "stopped",
        "text",
        "text_parts",
        "timings",
    )

    def __init__(self, internal_id: int, parsed: ParsedRequest, sender: Any, text: TextStream) -> None:
        self.id = internal_id
        self.parsed = parsed
        self.sender = sender
        """Triton's response sender."""
        self.text = text
        self.text_parts: list[str] = []
        """Text not sent yet: all of it unless streaming."""
        self.inbox: deque[TokenOutput] = deque()
        self.queued = False
        """In the sender's queue; keeps it there at most once, which is what merges tokens for a slow sender."""
        self.failure: FlashserveError | None = None
        self.stopped = False
        """A stop string was found; what the engine still sends does not count."""
        self.cancelled = False
        self.closed = False
        """FINAL was sent; nothing may follow."""
        self.num_tokens = 0
        self.num_tokens_sent = 0
        self.timings: RequestTimings | None = None
        self.last_token_time: float | None = None
        self.last_sent = parsed.arrival
        self._closing = threading.Lock()

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
