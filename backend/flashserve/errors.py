"""Typed errors, and the suffix that carries them through Triton.

Tritonserver 2.51 turns every error code of a backend into HTTP 400, so the code travels in the message::

    queue is full: 512 requests wait [code=UNAVAILABLE retry_after_ms=850]

Clients read the suffix and need not guess from the words. Ours cannot import this module, so it has a table of its own;
``tests/unit/test_client_errors.py`` holds the two together.
"""

from __future__ import annotations

INVALID_ARG = "INVALID_ARG"
NOT_FOUND = "NOT_FOUND"
UNAVAILABLE = "UNAVAILABLE"
CANCELLED = "CANCELLED"
INTERNAL = "INTERNAL"


class FlashserveError(Exception):
    """An error with a Triton code; ``str(error)`` is the message without the suffix."""

    code = INTERNAL

    def __init__(self, message: str, **details: str | int) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def wire_message(self) -> str:
        """The message as it is sent to clients: words, then the parseable suffix."""
        fields = "".join(f" {key}={value}" for key, value in self.details.items())
        return f"{self.message} [code={self.code}{fields}]"


class InvalidArgument(FlashserveError):
    """The request or the configuration is wrong; the message names the field and the allowed range."""

    code = INVALID_ARG


class NotFound(FlashserveError):
    """Something that the request names does not exist."""

    code = NOT_FOUND


class Unavailable(FlashserveError):
    """The engine cannot take the request now; ``retry_after_ms`` says when to try again."""

    code = UNAVAILABLE

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message, retry_after_ms=retry_after_ms)
        self.retry_after_ms = retry_after_ms


class Cancelled(FlashserveError):
    """The request was ended early; ``reason`` is client, deadline, or shutdown."""

    code = CANCELLED

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message, reason=reason)
        self.reason = reason


class InternalError(FlashserveError):
    """A bug of ours: the log has the details under the request's id, the message has none of them."""

    code = INTERNAL


class ConfigError(InvalidArgument):
    """``model.json`` or the model's own files cannot be served as they are."""


BY_CODE: dict[str, type[FlashserveError]] = {
    INVALID_ARG: InvalidArgument,
    NOT_FOUND: NotFound,
    INTERNAL: InternalError,
}
"""Errors that take nothing but a message."""
