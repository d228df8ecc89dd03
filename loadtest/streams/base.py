"""What every protocol's stream takes and fills in."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..record import CANCELLED, IMPATIENT, TIMEOUT, Record, RequestFailed


@dataclass(frozen=True)
class Ask:
    """One request, in any protocol."""

    prompt: str
    max_tokens: int
    params: Mapping[str, Any] = field(default_factory=dict)
    """Further sampling parameters, by the protocol's names."""
    timeout_s: float = 300.0
    impatient: bool = False
    """That timeout is meant to be hit."""
    cancel_after_tokens: int | None = None
    """Close the stream once so many tokens have come (chunks, where the server does not tell)."""
    history: tuple[tuple[str, str], ...] = ()
    """The conversation's earlier turns: prompt and answer."""

    @property
    def text(self) -> str:
        """The whole conversation in one text: what it was before is its beginning, as prefix caches want it."""
        return "".join(prompt + answer for prompt, answer in self.history) + self.prompt

    @property
    def messages(self) -> list[dict[str, str]]:
        """The same for chats."""
        contents = [text for turn in self.history for text in turn] + [self.prompt]
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


class Stream(ABC):
    """A target's connections, shared by all its requests."""

    protocol: ClassVar[str]

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    @abstractmethod
    def run(self, ask: Ask, record: Record) -> None:
        """Sends the request and fills in the record's chunks and usage. Raises RequestFailed."""

    @abstractmethod
    def close(self) -> None:
        """Ends every connection."""

    def new_record(self, planned: float | None = None) -> Record:
        """For a request that is sent now. ``planned`` is on the clock of `perf_counter`; None: now."""
        sent = time.perf_counter()
        return Record(self.protocol, sent if planned is None else planned, sent)

    def measure(self, ask: Ask, record: Record | None = None) -> Record:
        """Runs the request; an error is in the record, also if this call is killed."""
        record = self.new_record() if record is None else record
        try:
            self.run(ask, record)
        except RequestFailed as error:
            record.error, record.message = error.kind, error.message
            if ask.impatient and error.kind == TIMEOUT:
                record.error = IMPATIENT
        finally:
            record.end = time.perf_counter()
        return record


def cancel_if_due(ask: Ask, record: Record) -> None:
    """Raises RequestFailed where the plan says that this client leaves now."""
    limit = ask.cancel_after_tokens
    if limit is not None and sum(tokens or 1 for _, tokens in record.chunks) >= limit:
        raise RequestFailed(CANCELLED, f"after {limit} tokens, as planned")
