"""Reasoning before the answer: <think> … </think>, whose beginning some templates put into the prompt."""

from __future__ import annotations

from .events import Event, Reader, Reasoning
from .scanner import END, Parsing, Scanner

OPENING, CLOSING = "<think>", "</think>"


class ReasoningReader:
    """Splits reasoning off; what follows it goes to another reader, so that no tool is called in it."""

    def __init__(self, then: Reader, has_begun: bool = False) -> None:
        """``has_begun``: the prompt ended with the opening tag."""
        self._then = then
        self._head: _Head | None = _Head(has_begun)

    def feed(self, text: str) -> list[Event]:
        if self._head is None:
            return self._then.feed(text)
        events: list[Event] = []
        for number, character in enumerate(text):
            events += self._head.feed(character)
            if self._head.rest is not None:
                rest, self._head = self._head.rest + text[number + 1 :], None
                return _joined(events) + self._then.feed(rest)
        return _joined(events)

    def end(self) -> list[Event]:
        if self._head is None:
            return self._then.end()
        events = self._head.end()
        rest = self._head.rest or ""
        self._head = None
        return events + self._then.feed(rest) + self._then.end()


class _Head(Scanner):
    """The part up to the answer; `rest` is then what was read of that."""

    def __init__(self, has_begun: bool) -> None:
        self._has_begun = has_begun
        self.rest: str | None = None
        super().__init__()

    def _parse(self) -> Parsing[None]:
        space = ""
        if not self._has_begun:
            while (character := (yield from self._next())).isspace():
                space += character
            self._put_back(character)
            if not (yield from self._matches(OPENING)):
                self.rest = space + "".join(reversed(self._ahead))
                return
        yield from self._reasoning()
        character = yield from self._next_visible()
        self.rest = character

    def _reasoning(self) -> Parsing[None]:
        """White space at its beginning and end is the template's, not the model's."""
        space, has_text = "", False
        while True:
            character = yield from self._next()
            if character == END:
                self._put_back(END)
                return
            if character.isspace():
                space += character
                continue
            if character == CLOSING[0]:
                self._put_back(character)
                if (yield from self._matches(CLOSING)):
                    return
                yield from self._next()
            self._emit(Reasoning(space + character if has_text else character))
            space, has_text = "", True


def _joined(events: list[Event]) -> list[Event]:
    """All of them are reasoning."""
    text = "".join(event.text for event in events if isinstance(event, Reasoning))
    return [Reasoning(text)] if text else []
