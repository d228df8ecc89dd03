"""The suffix that carries an error's code through Triton, and Triton's own messages that have none."""

from __future__ import annotations

import pickle

import pytest

from flashserve import errors
from flashserve_client import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    FlashserveError,
    InternalError,
    InvalidRequest,
    NotFound,
    Timeout,
    Unavailable,
)
from flashserve_client.errors import error_from_message


@pytest.mark.parametrize(
    ("message", "kind", "words", "retry_after_ms", "reason"),
    [
        ("queue is full [code=UNAVAILABLE retry_after_ms=850]", Unavailable, "queue is full", 850, None),
        ("too late [code=CANCELLED reason=deadline]", DeadlineExceeded, "too late", None, "deadline"),
        ("draining [code=CANCELLED reason=shutdown]", Cancelled, "draining", None, "shutdown"),
        ("top_p: [0, 1] is allowed [code=INVALID_ARG]", InvalidRequest, "top_p: [0, 1] is allowed", None, None),
        ("no adapter x [code=NOT_FOUND]", NotFound, "no adapter x", None, None),
        ("a bug [code=INTERNAL]", InternalError, "a bug", None, None),
        ("newer [code=SOMETHING_NEW field=1]", InternalError, "newer", None, None),
        ("two\nlines [code=UNAVAILABLE retry_after_ms=soon]", Unavailable, "two\nlines", None, None),
    ],
)
def test_the_suffix_becomes_type_and_fields(message, kind, words, retry_after_ms, reason):
    error = error_from_message(message)
    assert type(error) is kind
    assert (str(error), error.message) == (words, words)
    assert (error.retry_after_ms, error.reason) == (retry_after_ms, reason)


SENT = [
    (errors.FlashserveError("words"), InternalError),
    (errors.InvalidArgument("words"), InvalidRequest),
    (errors.ConfigError("words"), InvalidRequest),
    (errors.NotFound("words"), NotFound),
    (errors.Unavailable("words [1]", retry_after_ms=850), Unavailable),
    (errors.Cancelled("words", reason="deadline"), DeadlineExceeded),
    (errors.Cancelled("words", reason="shutdown"), Cancelled),
    (errors.InternalError("words"), InternalError),
]


@pytest.mark.parametrize(("sent", "kind"), SENT, ids=repr)
def test_the_client_reads_what_the_backend_writes(sent, kind):
    error = error_from_message(sent.wire_message())
    assert (type(error), error.message, error.code) == (kind, sent.message, sent.code)
    read = {"retry_after_ms": error.retry_after_ms, "reason": error.reason}
    assert {name: value for name, value in read.items() if value is not None} == sent.details


def test_no_error_of_the_backend_is_left_out():
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert kinds == {type(sent) for sent, _ in SENT}


def test_a_suffix_in_the_middle_is_text():
    error = error_from_message("you wrote [code=INTERNAL] in your prompt [code=INVALID_ARG]")
    assert type(error) is InvalidRequest
    assert error.message == "you wrote [code=INTERNAL] in your prompt"


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Request for unknown model: 'x' is not found", NotFound),
        ("Request for unknown model: 'x' has no available versions", Unavailable),
        ("Stub process 'demo_0_0' is not healthy.", Unavailable),
        ("unexpected inference input 'foo' for model 'demo'", InvalidRequest),
    ],
)
def test_tritons_own_messages_are_known_by_their_text(message, kind):
    assert type(error_from_message(message)) is kind


def test_an_unknown_message_takes_the_protocols_code():
    assert type(error_from_message("strange", "INTERNAL")) is InternalError


def test_a_deadline_is_a_cancellation_and_transport_errors_are_pythons_own_kinds():
    assert issubclass(DeadlineExceeded, Cancelled)
    assert issubclass(ConnectionFailed, ConnectionError)
    assert issubclass(Timeout, TimeoutError)
    assert issubclass(InvalidRequest, ValueError)


@pytest.mark.parametrize("kind", [Unavailable, ConnectionFailed, Timeout, InvalidRequest])
def test_errors_survive_pickling(kind):
    """They cross process pools."""
    error = pickle.loads(pickle.dumps(kind("text", retry_after_ms=5)))
    assert isinstance(error, FlashserveError)
    assert (type(error), str(error), error.retry_after_ms, error.code) == (kind, "text", 5, kind.default_code)
