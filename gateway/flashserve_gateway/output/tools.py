"""Tool calls in what a model writes: the formats of Hermes and Qwen, Llama 3, Mistral, and calls as in Python.

    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}     after <|python_tag|> or at the beginning
    [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]
    [TOOL_CALLS]f[ARGS]{"a": 1}
    [f(a=1), g()]                                                              at the beginning

Which of them it is, the text tells. What has no mark of its own is a call only if it names one of the request's tools;
everything that turns out not to be a call is text. The characters of arguments in JSON are passed on as they come,
never parsed and written anew: so pieces can be sent at once, and joined they are what the model wrote.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection

from .events import CallArguments, CallStart, Text
from .scanner import END, Parsing, Scanner

_HERMES, _HERMES_END = "<tool_call>", "</tool_call>"
_LLAMA = "<|python_tag|>"
_MISTRAL, _MISTRAL_ARGS, _MISTRAL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_MARKS = (_HERMES, _LLAMA, _MISTRAL)
_ARGUMENTS = ("arguments", "parameters")
# Of an object that is to be a call without saying so: an answer in JSON is let go at its first other key.
_CALL_KEYS = ("name", "type", "id", "function", *_ARGUMENTS)
_NAME_LENGTH = 256
_MAX_LITERAL = 1 << 20


class ToolReader(Scanner):
    """Reads text and calls."""

    def __init__(self, names: Collection[str]) -> None:
        """``names``: the tools of the request."""
        self._names = frozenset(names)
        self._has_called = False
        super().__init__()

    def _parse(self) -> Parsing[None]:
        space = ""
        while (character := (yield from self._next())).isspace():
            space += character
        self._put_back(character)
        if character in ("{", "["):
            yield from self._unmarked(space)
            space = ""
        yield from self._text(space)

    def _text(self, space: str) -> Parsing[None]:
        """Until the end. White space before a call belongs to the format."""
        while (character := (yield from self._next())) != END:
            if character.isspace():
                space += character
                continue
            if character in "<[":
                self._put_back(character)
                self._try(space)
                if (mark := (yield from self._mark())) is not None:
                    yield from self._marked(mark)
                    space = ""
                    continue
                self._commit()
                yield from self._next()
            self._emit(Text(space + character))
            space = ""
        if space and not self._has_called:
            self._emit(Text(space))

    def _mark(self) -> Parsing[str | None]:
        for mark in _MARKS:
            if (yield from self._matches(mark)):
                return mark
        return None

    def _marked(self, mark: str) -> Parsing[None]:
        """What follows a mark, which is part of the attempt."""
        if mark == _HERMES:
            yield from self._hermes()
        elif mark == _MISTRAL:
            yield from self._mistral()
        else:
            yield from self._llama(known_only=False)

    def _unmarked(self, space: str) -> Parsing[None]:
        """At the beginning: an object, a list of objects, or calls as in Python."""
        self._try(space)
        character = yield from self._next()
        if character == "{":
            self._put_back(character)
            yield from self._llama(known_only=True)
            return
        following = yield from self._next_visible()
        self._put_back(following)
        if following == "{":
            yield from self._list(known_only=True)
        elif following == "T" and (yield from self._matches(_MISTRAL[1:])):
            yield from self._mistral()
        else:
            yield from self._pythonic()

    # --- the formats ---------------------------------------------------------------------------------------------

    def _hermes(self) -> Parsing[None]:
        character = yield from self._next_visible()
        self._put_back(character)
        if not (yield from self._call(known_only=False)):
            return
        character = yield from self._next_visible()
        self._put_back(character)
        yield from self._matches(_HERMES_END)

    def _llama(self, known_only: bool) -> Parsing[None]:
        """Objects with semicolons, commas or only space between them."""
        while True:
            character = yield from self._next_visible()
            self._put_back(character)
            if character != "{" or not (yield from self._call(known_only)):
                break
            self._try()
            separator = yield from self._next_visible()
            if separator not in (";", ","):
                self._put_back(separator)
        if self._record is not None:
            self._take_back_unless_blank()

    def _mistral(self) -> Parsing[None]:
        character = yield from self._next_visible()
        if character == "[":
            yield from self._list(known_only=False)
            return
        self._put_back(character)
        if character == "{":
            yield from self._llama(known_only=False)
            return
        name = yield from self._name("[{")
        if (yield from self._matches(_MISTRAL_ID)):
            yield from self._name("[{")
        yield from self._matches(_MISTRAL_ARGS)
        opening = yield from self._next_visible()
        if not name or opening != "{":
            self._put_back(opening)
            self._take_back()
            return
        self._start(name)
        yield from self._brackets(opening, None)

    def _list(self, known_only: bool) -> Parsing[None]:
        """The rest of a list of objects."""
        while True:
            character = yield from self._next_visible()
            if character == "]":
                self._commit()
                return
            self._put_back(character)
            if character != "{" or not (yield from self._call(known_only)):
                break
            self._try()
            separator = yield from self._next_visible()
            if separator != ",":
                self._put_back(separator)
        if self._record is not None:
            self._take_back_unless_blank()

    def _pythonic(self) -> Parsing[None]:
        """The rest of a list of calls."""
        while True:
            character = yield from self._next_visible()
            if character == "]" and self._has_called:
                self._commit()
                return
            self._put_back(character)
            name = yield from self._name("(<[")  # the last two begin marks, which are looked for in what is no call
            opening = yield from self._next()
            if opening != "(" or name not in self._names:
                self._put_back(opening)
                self._take_back()
                return
            self._start(name)
            if not (yield from self._keywords()):
                return
            self._try()
            separator = yield from self._next_visible()
            if separator != ",":
                self._put_back(separator)

    # --- their parts ---------------------------------------------------------------------------------------------

    def _start(self, name: str) -> None:
        self._commit()
        self._has_called = True
        self._emit(CallStart(name))

    def _take_back_unless_blank(self) -> None:
        """Behind calls, space and separators are nothing."""
        assert self._record is not None
        if self._has_called and not "".join(self._record).strip(" \t\r\n,;"):
            self._commit()
        else:
            self._take_back()

    def _name(self, stops: str) -> Parsing[str]:
        name = ""
        while len(name) <= _NAME_LENGTH:
            character = yield from self._next()
            if character == END or character in stops or character.isspace():
                self._put_back(character)
                break
            name += character
        return name

    def _call(self, known_only: bool) -> Parsing[bool]:
        """An object with a name and arguments, in either order. If it is none, all of the attempt is text."""
        name: str | None = None
        held: list[str] = []
        has_started = has_arguments = is_whole = False
        yield from self._next()  # the brace
        while True:
            character = yield from self._next_visible()
            if character == ",":
                continue
            if character == "}":
                is_whole = True
                break
            key = (yield from self._string()) if character == '"' else None
            if key is None or (known_only and key not in _CALL_KEYS):
                break
            if (yield from self._next_visible()) != ":":
                break
            character = yield from self._next_visible()
            if key == "name" and name is None:
                name = (yield from self._string()) if character == '"' else None
                if not name or (known_only and name not in self._names):
                    name = None
                    break
                if not has_arguments:
                    self._start(name)
                    has_started = True
            elif key in _ARGUMENTS and not has_arguments:
                has_arguments = yield from self._arguments(character, None if has_started else held)
            else:
                yield from self._skip(character)
        if name is None or not (is_whole or has_started):
            self._take_back()
            return False
        if not has_started:
            self._start(name)
            self._emit(CallArguments("".join(held)))
        elif is_whole and not has_arguments:
            self._emit(CallArguments("{}"))
        return is_whole

    def _arguments(self, character: str, sink: list[str] | None) -> Parsing[bool]:
        """An object, also one written as a string. False if there is none."""
        if character == "{":
            yield from self._brackets(character, sink)
            return True
        if character == '"':
            text = yield from self._string()
            if text is None or not text.lstrip().startswith("{"):
                return False
            self._pour(text, sink)
            return True
        yield from self._skip(character)
        return False

    def _skip(self, character: str) -> Parsing[None]:
        """A value of no interest."""
        if character in ("{", "["):
            yield from self._brackets(character, [])
        elif character == '"':
            yield from self._string()
        else:
            while character != END and character not in ",}":
                character = yield from self._next()
            self._put_back(character)

    def _keywords(self) -> Parsing[bool]:
        """The rest of a Python call, as an object that grows keyword by keyword. False if the text ends in it."""
        written = "{"
        while True:
            character = yield from self._next_visible()
            if character == END:
                self._put_back(END)
                return False
            if character == ")":
                self._emit(CallArguments("{}" if written == "{" else "}"))
                return True
            if character == ",":
                continue
            self._put_back(character)
            key = (yield from self._name("=)")).strip()
            character = yield from self._next_visible()
            if character != "=":  # no keyword: such arguments have no names to give them
                self._put_back(character)
                continue
            value = yield from self._literal()
            if value is None:
                return False
            self._emit(CallArguments(f"{written}{json.dumps(key)}: {value}"))
            written = ", "

    def _literal(self) -> Parsing[str | None]:
        """A Python literal as JSON; what is none, as a string."""
        raw: list[str] = []
        depth, quote, escaped = 0, "", False
        while len(raw) < _MAX_LITERAL:
            character = yield from self._next()
            if character == END:
                self._put_back(END)
                return None
            if quote:
                quote = "" if character == quote and not escaped else quote
                escaped = character == "\\" and not escaped
            elif character in "'\"":
                quote = character
            elif character in "([{":
                depth += 1
            elif depth == 0 and character in ",)":
                self._put_back(character)
                break
            elif character in ")]}":
                depth -= 1
            raw.append(character)
        text = "".join(raw).strip()
        try:
            return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return json.dumps(text, ensure_ascii=False)
