"""The conversation of `flashserve chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
from typing import Any

from .errors import ConnectionFailed, FlashserveError
from .sync_client import Client
from .terminal import describe, explain, fail, write

with contextlib.suppress(ImportError):  # history and editing of lines, where the platform has it
    import readline  # noqa: F401

_PROMPT = ">>> "
_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def chat(client: Client, model: str, system: str | None, params: Mapping[str, Any], stats: bool) -> int:
    """Reads lines and answers them until /exit or the end of input. Returns the exit code.

    Lines that come through a pipe are answered one after the other, without prompts; there the first error ends it.
    """
    interactive = sys.stdin.isatty()
    conversation = Conversation(client, model, system, params)
    if interactive:
        write(f"Talking with {model} at {client.url}. {_HELP}.\n")
    while True:
        try:
            line = input(_PROMPT if interactive else "").strip()
        except EOFError:
            write("\n" if interactive else "")
            return 0
        except KeyboardInterrupt:
            write(f"\n({_HELP})\n")
            continue
        if line == "/exit":
            return 0
        if line == "/reset":
            conversation.reset()
            write("(forgotten)\n" if interactive else "")
        elif line.startswith("/"):
            write(f"({_HELP})\n")
        elif line:
            try:
                conversation.answer(line, stats)
            except FlashserveError as error:
                code = fail(explain(error, client.url), 1)
                if not interactive or isinstance(error, ConnectionFailed):
                    return code


class Conversation:
    """The messages so far. A question that could not be answered is not among them, so it can be asked again."""

    def __init__(self, client: Client, model: str, system: str | None, params: Mapping[str, Any]) -> None:
        self._client = client
        self._model = model
        self._params = params
        self._first = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._first)

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages = list(self._first)

    def answer(self, question: str, stats: bool) -> None:
        """Writes the answer as it comes. Ctrl-C ends it here and on the server, and keeps what was said."""
        messages = [*self.messages, {"role": "user", "content": question}]
        said: list[str] = []
        with self._client.stream(messages, model=self._model, **self._params) as stream:
            try:
                for delta in stream:
                    said.append(delta.text)
                    write(delta.text)
            except KeyboardInterrupt:
                write(" (stopped)")
        write("\n")
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]
        if stats and stream.finished:
            print(describe(stream.result, streamed=True), file=sys.stderr)
