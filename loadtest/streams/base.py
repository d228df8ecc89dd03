"""What every protocol's stream takes and fills in."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from greenlet import GreenletExit

from ..record import CANCELLED, IMPATIENT, TIMEOUT, UNFINISHED, Record, RequestFailed


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


class Stream(ABC):
    """A target's connections, shared by all its requests."""

    protocol: ClassVar[str]

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model

    @abstractmethod
    def run(self, ask: Ask, record: Record) -> None:
        """Sends the request and fills in the record's chunks and usage. Raises RequestFailed."""

    def close(self) -> None:
        """Ends every connection."""

    def measure(self, ask: Ask, planned: float | None = None) -> Record:
        """Runs the request; an error is in the record. ``planned`` is on the clock of `perf_counter`."""
        sent = time.perf_counter()
        record = Record(self.protocol, sent if planned is None else planned, sent)
        try:
            self.run(ask, record)
        except RequestFailed as error:
            record.error, record.message = error.kind, error.message
            if ask.impatient and error.kind == TIMEOUT:
                record.error = IMPATIENT
        except GreenletExit:  # the run is over
            record.error, record.message = UNFINISHED, "it still ran when the run was over"
        record.end = time.perf_counter()
        return record


def cancel_if_due(ask: Ask, record: Record) -> None:
    """Raises RequestFailed where the plan says that this client leaves now."""
    limit = ask.cancel_after_tokens
    if limit is not None and sum(tokens or 1 for _, tokens in record.chunks) >= limit:
        raise RequestFailed(CANCELLED, f"after {limit} tokens, as planned")
