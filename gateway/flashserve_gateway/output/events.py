"""The kinds of output. A reader turns pieces of text into these, however the text is cut into pieces."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Text(NamedTuple):
    """A piece of the answer."""

    text: str


class Reasoning(NamedTuple):
    """A piece of what the model thinks before it answers."""

    text: str


class CallStart(NamedTuple):
    """A tool call begins; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """A piece of the arguments of the call that began last. Joined, they are a JSON object."""

    text: str


Event = Text | Reasoning | CallStart | CallArguments


class Reader(Protocol):
    """Reads one answer."""

    def feed(self, text: str) -> list[Event]:
        """What is certain after this piece."""

    def end(self) -> list[Event]:
        """What was held back, when nothing more comes."""


class PlainReader:
    """All of it is text."""

    def feed(self, text: str) -> list[Event]:
        return [Text(text)] if text else []

    def end(self) -> list[Event]:
        return []
