"""Errors in OpenAI's shape, and how the engine's errors become them.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import orjson

from flashserve_client import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    FlashserveError,
    InvalidRequest,
    NotFound,
    Timeout,
    Unavailable,
)

log = logging.getLogger("flashserve_gateway")

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error"}
ANTHROPIC_PATH = "/v1/messages"
# The openai client gives up at once when it is told to wait for more than two minutes.
_MAX_RETRY_AFTER_S = 120.0
_RETRY_UNREACHABLE_S = 1.0
# The engine names a field first: "temperature must be ...", "chat_request.messages[0].content[1] is of type ...".
_ENGINES_OWN = re.compile(r"\b(?:chat_request|embedding_request|pooling_params)\.")
"""Where the engine found a field, which its client put somewhere else."""
_FIELD = re.compile(r"(?:unknown parameter '?)?([a-z_]+[\w.\[\]]*)(?=[ :='])")
_PARAM_NAMES = {"text_input": "prompt", "prompt_token_ids": "prompt", "chat_request": "messages"}
_TOO_LONG = re.compile(r"context takes at most|cannot fit into")


class ApiError(Exception):
    """An error that a client is told.

    Args:
        param: the field of the request that is wrong.
        code: OpenAI's word for it, where it has one.
        retry_after_s: when to ask again, in seconds.
        close: the connection ends too, since the rest of the request is not read.
        is_full: of a 503: the engine's queue is full, and nothing else is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        close: bool = False,
        is_full: bool = False,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.close = close
        self.is_full = is_full

    @property
    def body(self) -> bytes:
        """The JSON that is sent, also as the last event of a stream that had begun."""
        return orjson.dumps({"error": error_object(self)})

    @property
    def headers(self) -> dict[str, str]:
        """What belongs to the answer beside its body."""
        headers = {"content-type": "application/json"}
        if self.retry_after_s is not None:
            wait_s = min(max(self.retry_after_s, 0.001), _MAX_RETRY_AFTER_S)
            headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
            headers["retry-after"] = str(math.ceil(wait_s))
        if self.status == 500:  # it would most likely fail again
            headers["x-should-retry"] = "false"
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return headers


def error_object(error: ApiError) -> Mapping[str, Any]:
    """The object under "error"."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def body_for(path: str, error: ApiError) -> bytes:
    """An error in the shape of the API that the path belongs to."""
    is_anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
    return anthropic_error(error) if is_anthropic else error.body


def anthropic_error(error: ApiError) -> bytes:
    """Anthropic's shape of an error."""
    kind = _ANTHROPIC_TYPES.get(error.status) or error_object(error)["type"]
    details = {} if error.code is None else {"details": {"error_code": error.code}}
    return orjson.dumps({"type": "error", "error": {"type": kind, "message": error.message, **details}})


def invalid(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A 400 for one field of the request."""
    return ApiError(400, message, param=param, code=code)


def internal_error(request_id: str) -> ApiError:
    """What a client learns of a bug: where the log has it."""
    return ApiError(
        500, f"the gateway failed; its log has the reason under request {request_id}", code="internal_error"
    )


def of_engine(error: FlashserveError, model: str, request_id: str) -> ApiError:
    """The answer to a request that the engine, or the way to it, refused."""
    retry_after_s = None if error.retry_after_ms is None else error.retry_after_ms / 1000
    if isinstance(error, InvalidRequest):
        return _of_invalid(error)
    if isinstance(error, NotFound):
        return model_not_found(model)
    if isinstance(error, Unavailable):
        return ApiError(
            503, error.message, code="overloaded", retry_after_s=retry_after_s or _RETRY_UNREACHABLE_S,
            is_full=error.is_full,
        )  # fmt: skip
    if isinstance(error, ConnectionFailed):
        log.warning("request %s: %s", request_id, error.message)
        return ApiError(503, "the engine cannot be reached", code="unreachable", retry_after_s=_RETRY_UNREACHABLE_S)
    if isinstance(error, DeadlineExceeded):
        return ApiError(408, error.message, code="deadline")
    if isinstance(error, Timeout):
        return ApiError(503, "the engine did not answer in time", code="timeout", retry_after_s=_RETRY_UNREACHABLE_S)
    if isinstance(error, Cancelled):  # by the server, which drains; who left himself hears nothing
        return ApiError(503, error.message, code="cancelled", retry_after_s=retry_after_s or _RETRY_UNREACHABLE_S)
    log.error("request %s: %s", request_id, error.message)
    message = f"the engine failed; its log has the reason under request {request_id}"
    return ApiError(500, message, code="internal_error")


def model_not_found(model: str) -> ApiError:
    """As OpenAI words it."""
    return ApiError(404, f"the model {model[:100]!r} does not exist", param="model", code="model_not_found")


def model_unavailable(model: str) -> ApiError:
    """For one that is expected back: clients come again after a 503, and never after a 404."""
    return ApiError(
        503, f"the model {model[:100]!r} is not available now", param="model", code="model_unavailable",
        retry_after_s=_RETRY_UNREACHABLE_S,
    )  # fmt: skip


def _of_invalid(error: InvalidRequest) -> ApiError:
    message = _ENGINES_OWN.sub("", error.message)
    found = _FIELD.match(message)
    param = found[1] if found else None
    code = "context_length_exceeded" if _TOO_LONG.search(message) else None
    return ApiError(400, message, param=_PARAM_NAMES.get(param or "", param), code=code)
