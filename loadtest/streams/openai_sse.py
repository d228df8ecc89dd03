"""OpenAI's completions and chat completions as server-sent events."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlsplit

from ..record import Record, RequestFailed
from .base import Ask, Stream, cancel_if_due
from .http_connection import Pool, events

_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "tool_calls")


class OpenAIStream(Stream):
    """``url`` ends in the API's base (``/v1``), or names `completions` or `chat/completions` below it."""

    protocol = "openai"

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        path = urlsplit(url).path.rstrip("/")
        self._chat = not path.endswith("/completions") or path.endswith("/chat/completions")
        self._path = path if path.endswith("/completions") else f"{path}/chat/completions"
        self._pool = Pool(url)
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Accept": "text/event-stream", **({"Authorization": f"Bearer {key}"} if key else {})}

    def run(self, ask: Ask, record: Record) -> None:
        prompt = {"messages": ask.messages} if self._chat else {"prompt": ask.text}
        body = {
            "model": self.model,
            **prompt,
            "max_tokens": ask.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **ask.params,
        }
        data = json.dumps(body).encode()
        with self._pool.post(self._path, data, self._headers, ask.timeout_s) as (status, pieces, wire):
            if status != 200:
                raise _refusal(f"HTTP {status}", b"".join(pieces))
            for arrival, event in events(pieces, wire):
                if event != b"[DONE]":
                    self._take(event, arrival, record)
                    cancel_if_due(ask, record)

    def _take(self, event: bytes, arrival: float, record: Record) -> None:
        try:
            chunk: Any = json.loads(event)
            if "error" in chunk:
                raise _refusal("error", event)
            if usage := chunk.get("usage"):
                record.prompt_tokens, record.output_tokens = usage.get("prompt_tokens"), usage.get("completion_tokens")
            for choice in chunk.get("choices") or ():
                delta = (choice.get("delta") or {}) if self._chat else choice
                has_text = any(delta.get(name) for name in (_TEXT_FIELDS if self._chat else ("text",)))
                record.add_chunk(arrival, None, has_text, delta.get("content" if self._chat else "text") or "")
        except (ValueError, TypeError, AttributeError):
            raise RequestFailed("INTERNAL", f"the server sent what is no chunk: {event[:80]!r}") from None

    def close(self) -> None:
        self._pool.close()


def _refusal(kind: str, body: bytes) -> RequestFailed:
    text = body.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        return RequestFailed(str(error.get("code") or error.get("type") or kind), str(error.get("message")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return RequestFailed(kind, text.strip())
