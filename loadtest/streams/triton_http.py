"""Triton's `generate_stream`: JSON in, server-sent events out."""

from __future__ import annotations

import json

from flashserve_client import FlashserveError, InvalidRequest
from flashserve_client.errors import error_from_message
from flashserve_client.http_transport import parse_event, request_body, request_path
from flashserve_client.request import InferRequest, generate_request

from ..record import Record, RequestFailed
from .base import Ask, Stream, cancel_if_due
from .http_connection import Pool, events

NOT_FINISHED = (None, "None")  # the second is the backend's text for the first


class TritonHttpStream(Stream):
    protocol = "triton-http"

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        self._pool = Pool(url)

    def run(self, ask: Ask, record: Record) -> None:
        request = triton_request(self.model, ask)
        try:
            path, body = request_path(request, "generate_stream"), request_body(request)
        except InvalidRequest as error:
            raise RequestFailed(error.code, error.message) from None
        with self._pool.post(path, body, {"Accept": "text/event-stream"}, ask.timeout_s) as (status, pieces, wire):
            if status != 200:
                raise _refusal(status, b"".join(pieces))
            for arrival, data in events(pieces, wire):
                try:
                    chunk = parse_event(json.loads(data))
                except FlashserveError as error:
                    raise RequestFailed(error.code, error.message) from None
                except ValueError:
                    raise RequestFailed("INTERNAL", f"the server sent what is not JSON: {data[:80]!r}") from None
                record.add_chunk(arrival, chunk.output_tokens, bool(chunk.text), chunk.text)
                add_usage(record, chunk.input_tokens, chunk.output_tokens)
                if chunk.finish_reason in NOT_FINISHED:  # one that has ended need not be left
                    cancel_if_due(ask, record)

    def close(self) -> None:
        self._pool.close()


def triton_request(model: str, ask: Ask) -> InferRequest:
    """The client's request, streamed, with everything counted."""
    params = {"max_tokens": ask.max_tokens, **ask.params}
    try:
        return generate_request(
            ask.text, model=model, stream=True, timeout_s=None, priority=None, request_id=None, params=params
        )
    except InvalidRequest as error:
        raise RequestFailed(error.code, error.message) from None


def add_usage(record: Record, prompt_tokens: int | None, output_tokens: int | None) -> None:
    """Triton's responses tell the tokens of each, and the prompt's with the first or the last."""
    if prompt_tokens is not None:
        record.prompt_tokens = prompt_tokens
    if output_tokens is not None:
        record.output_tokens = (record.output_tokens or 0) + output_tokens


def _refusal(status: int, body: bytes) -> RequestFailed:
    text = body.decode("utf-8", "replace").removeprefix("data: ")
    try:
        error = error_from_message(str(json.loads(text)["error"]))
    except (ValueError, KeyError, TypeError):
        return RequestFailed(f"HTTP {status}", text.strip())
    return RequestFailed(error.code, error.message)
