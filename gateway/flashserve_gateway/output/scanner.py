"""Readers that are written as parsers of single characters: how a text is cut into pieces cannot matter to them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterable
from typing import TypeVar

from .events import CallArguments, Event, Reasoning, Text

T = TypeVar("T")
Parsing = Generator[None, str, T]
"""A part of a parser: receives characters, returns a T."""

END = ""
"""Behind the last character."""


class Scanner:
    """Runs a parser, and gives it what parsers need: looking ahead, and taking back what turned out otherwise."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._ahead: list[str] = []
        self._record: list[str] | None = None
        self._parser = self._parse()
        next(self._parser)

    def feed(self, text: Iterable[str]) -> list[Event]:
        """What is certain after these characters."""
        with contextlib.suppress(StopIteration):
            for character in text:
                self._parser.send(character)
        return self._take()

    def end(self) -> list[Event]:
        """What was held back."""
        return self.feed([END])

    def _parse(self) -> Parsing[None]:
        """The parser; what comes after it has returned, it does not want."""
        raise NotImplementedError

    def _take(self) -> list[Event]:
        """The events so far; pieces of one kind that follow each other as one."""
        joined: list[Event] = []
        run: list[str] = []
        for number, event in enumerate(self._events):
            if not isinstance(event, (Text, Reasoning, CallArguments)):
                joined.append(event)
                continue
            run.append(event.text)
            following = self._events[number + 1] if number + 1 < len(self._events) else None
            if type(following) is not type(event):
                joined.append(type(event)("".join(run)))
                run = []
        self._events = []
        return joined

    # --- for parsers ---------------------------------------------------------------------------------------------

    def _emit(self, event: Event) -> None:
        self._events.append(event)

    def _next(self) -> Parsing[str]:
        """The next character, or END."""
        character = self._ahead.pop() if self._ahead else (yield)
        if self._record is not None:
            self._record.append(character)
        return character

    def _put_back(self, text: str | list[str]) -> None:
        """To be read again."""
        self._ahead.extend(reversed(text) if text != END else [END])
        if self._record is not None:
            del self._record[len(self._record) - max(len(text), 1) :]

    def _next_visible(self) -> Parsing[str]:
        """The next character that is no white space."""
        while True:
            character = yield from self._next()
            if character == END or not character.isspace():
                return character

    def _matches(self, literal: str) -> Parsing[bool]:
        """Whether this comes next; only then it is consumed."""
        seen: list[str] = []
        for wanted in literal:
            character = yield from self._next()
            seen.append(character)
            if character != wanted:
                self._put_back(seen)
                return False
        return True

    def _try(self, before: str = "") -> None:
        """From here on what is read can be taken back as text, behind what came ``before``."""
        self._record = list(before)

    def _commit(self) -> None:
        """It was what it seemed."""
        self._record = None

    def _take_back(self) -> None:
        """It was text."""
        assert self._record is not None
        ended = bool(self._record) and self._record[-1] == END
        text, self._record = "".join(self._record), None
        if text:
            self._emit(Text(text))
        if ended:
            self._put_back(END)

    # --- JSON ----------------------------------------------------------------------------------------------------

    def _string(self) -> Parsing[str | None]:
        """A string's value; its opening quote was read. None if the text ends in it."""
        raw: list[str] = []
        while (character := (yield from self._next())) != '"':
            if character == END:
                self._put_back(END)
                return None
            raw.append(character)
            if character == "\\":
                raw.append((yield from self._next()))
        text = "".join(raw)
        try:
            return str(json.loads(f'"{text}"', strict=False))
        except ValueError:
            return text

    def _brackets(self, opening: str, sink: list[str] | None) -> Parsing[bool]:
        """The rest of an object or list, as it is, into `sink` or out as arguments. False if the text ends in it."""
        depth, in_string, escaped = 1, False, False
        self._pour(opening, sink)
        while depth:
            character = yield from self._next()
            if character == END:
                self._put_back(END)
                return False
            self._pour(character, sink)
            if in_string:
                in_string = escaped or character != '"'
                escaped = character == "\\" and not escaped
            elif character == '"':
                in_string = True
            else:
                depth += (character in "{[") - (character in "}]")
        return True

    def _pour(self, character: str, sink: list[str] | None) -> None:
        if sink is None:
            self._emit(CallArguments(character))
        else:
            sink.append(character)
