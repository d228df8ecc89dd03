"""Typed errors, made from the text of a server's message.

tritonserver 2.51 turns every error of a backend into HTTP 400 and drops its code on gRPC streams, so every
message of flashserve ends in a suffix that carries the code, e.g. ``queue is full [code=UNAVAILABLE
retry_after_ms=850]``. Messages of tritonserver's own have no suffix; the few that matter are known by their text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .results import GenerateResult

_SUFFIX = re.compile(r" ?\[code=([A-Z_]+)((?: [a-z_]+=[^\s\]]+)*)\]$")

# tritonserver's own messages, in the order in which they are tried.
_TRITON_TEXTS = (
    (re.compile(r"has no available versions|is not ready|not healthy|[Ss]erver is (stopping|exiting)"), "UNAVAILABLE"),
    (re.compile(r"unknown model|is not found|failed to poll|[Nn]o such (file|model)"), "NOT_FOUND"),
)


class FlashserveError(Exception):
    """Base of every error that this package raises for a request.

    Attributes:
        message: what went wrong, without the suffix.
        code: INVALID_ARG, NOT_FOUND, UNAVAILABLE, CANCELLED, INTERNAL, ..., CONNECTION or TIMEOUT.
        retry_after_ms: the server's estimate of when it is worth asking again, in milliseconds, or None.
        reason: why a request was cancelled ("deadline", ...); "unreachable" if there was no connection; or None.
        partial: what a stream had delivered before the error, or None.
    """

    default_code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        retry_after_ms: int | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.retry_after_ms = retry_after_ms
        self.reason = reason
        self.partial: GenerateResult | None = None


class InvalidRequest(FlashserveError, ValueError):
    """The request is wrong: a bad value, an unknown parameter, a prompt that is too long. Do not retry."""

    default_code = "INVALID_ARG"


class NotFound(FlashserveError):
    """No such model or adapter."""

    default_code = "NOT_FOUND"


class Unavailable(FlashserveError):
    """Queue full, engine starting, dead or draining: try again after `retry_after_ms`."""

    default_code = "UNAVAILABLE"

    @property
    def is_full(self) -> bool:
        """Whether the engine is well and has no place: its own answer, which only its words tell from the others."""
        return "queue is full" in self.message


class Cancelled(FlashserveError):
    """The request was cancelled: by the server while draining, or because its stream was closed here."""

    default_code = "CANCELLED"


class DeadlineExceeded(Cancelled):
    """The server gave up because the request's deadline (`timeout_s`) had passed."""


class InternalError(FlashserveError):
    """A bug on the server's side; it is logged there with the request's id."""

    default_code = "INTERNAL"


class ConnectionFailed(FlashserveError, ConnectionError):
    """No server at the address, or the connection broke."""

    default_code = "CONNECTION"


class Timeout(FlashserveError, TimeoutError):
    """No answer in time, not even the server's own DeadlineExceeded: the server may be dead or hung."""

    default_code = "TIMEOUT"


# What the suffix says: its code, or its code and reason; anything else is the server's fault.
_KINDS: dict[str, type[FlashserveError]] = {
    "INVALID_ARG": InvalidRequest,
    "UNSUPPORTED": InvalidRequest,
    "NOT_FOUND": NotFound,
    "UNAVAILABLE": Unavailable,
    "CANCELLED": Cancelled,
    "CANCELLED deadline": DeadlineExceeded,
    "INTERNAL": InternalError,
}


def error_from_message(message: str, default_code: str = "INVALID_ARG") -> FlashserveError:
    """The typed error of a server's message; `default_code` if neither suffix nor known text tells the code."""
    match = _SUFFIX.search(message)
    if match is None:
        code = next((code for text, code in _TRITON_TEXTS if text.search(message)), default_code)
        return _KINDS.get(code, InternalError)(message, code=code)
    code = match[1]
    fields = dict(field.split("=", 1) for field in match[2].split())
    retry, reason = fields.get("retry_after_ms", ""), fields.get("reason")
    kind = _KINDS.get(f"{code} {reason}") or _KINDS.get(code, InternalError)
    retry_after_ms = int(retry) if retry.isdecimal() else None
    return kind(message[: match.start()], code=code, retry_after_ms=retry_after_ms, reason=reason)
