"""What a client may ask of a text's form: vLLM's ``structured_outputs``, checked as far as that needs no compiler."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flashserve.coercion import bool_of, is_unicode, shorten
from flashserve.errors import InvalidArgument
from flashserve.protocol import GrammarKind, StructuredOutputs

MAX_BYTES = 1 << 18
"""Of a schema or a grammar. What fits may still be too much to compile, which the engine finds out."""
FORMS = ("json", "json_object", "regex", "choice", "grammar")
RANGE = f"an object with exactly one of {', '.join(FORMS)}"
COMPACT = ""
"""As ``whitespace_pattern``: none at all."""
_NAME = "structured_outputs"
_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "close_json")
_NEUTRAL = {"disable_fallback": (False, True), "disable_additional_properties": (False,), "structural_tag": ()}
"""Of vLLM, with the values under which they make no difference: nothing falls back to another library here."""


def parse_structured_outputs(value: Any) -> StructuredOutputs:
    """From vLLM's object, also as JSON in a text. Raises InvalidArgument, naming the field."""
    if isinstance(value, StructuredOutputs):
        return value
    given = _object(value)
    for name, item in given.items():
        if name in _NEUTRAL and not any(item is neutral for neutral in _NEUTRAL[name]):
            raise InvalidArgument(f"{_NAME}.{name}={shorten(item)} is not supported")
        if name not in (*FORMS, *_OPTIONS, *_NEUTRAL):
            raise InvalidArgument(f"unknown key {shorten(name)} in {_NAME}; it takes {', '.join((*FORMS, *_OPTIONS))}")
    forms = [name for name in FORMS if name in given]
    if len(forms) != 1:
        raise InvalidArgument(f"{_NAME} must be {RANGE}, not {' and '.join(forms) or 'with none of them'}")
    form = forms[0]
    kind, text = _READERS[form](f"{_NAME}.{form}", given[form])
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise InvalidArgument(f"{_NAME}.{form} has {size} bytes; at most {MAX_BYTES} are taken")
    if not is_unicode(text):
        raise InvalidArgument(f"{_NAME}.{form} has a lone surrogate")
    return StructuredOutputs(kind, text, _whitespace(given, kind), _closes(given, kind))


def _object(value: Any) -> dict[str, Any]:
    """What is null asks for nothing, as in vLLM."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise InvalidArgument(f"{_NAME} must be {RANGE}, not the text {shorten(value)}") from None
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{_NAME} must be {RANGE}, not {shorten(value)}")
    return {name: item for name, item in value.items() if item is not None}


def _schema(name: str, value: Any) -> tuple[GrammarKind, str]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise InvalidArgument(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, (Mapping, bool)):
        raise InvalidArgument(f"{name} must be a JSON schema (an object, or its JSON), not {shorten(value)}")
    try:
        return "json", json.dumps(value, ensure_ascii=False, allow_nan=False)  # properties keep their order
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{name} cannot be written as JSON: {error}") from None


def _any_object(name: str, value: Any) -> tuple[GrammarKind, str]:
    if bool_of(value) is not True:
        raise InvalidArgument(f"{name} may only be true or left out, not {shorten(value)}")
    return "json", '{"type": "object"}'


def _text(kind: GrammarKind) -> Any:
    def read(name: str, value: Any) -> tuple[GrammarKind, str]:
        if not isinstance(value, str) or not value:
            raise InvalidArgument(f"{name} must be a non-empty string, not {shorten(value)}")
        return kind, value

    return read


def _choice(name: str, value: Any) -> tuple[GrammarKind, str]:
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(item, str) and item for item in value):
        raise InvalidArgument(f"{name} must be a non-empty list of non-empty strings, not {shorten(value)}")
    return "choice", json.dumps(list(value), ensure_ascii=False)


def _whitespace(given: dict[str, Any], kind: GrammarKind) -> str | None:
    pattern = given.get("whitespace_pattern")
    compact = bool_of(given.get("disable_any_whitespace", False))
    if compact is None:
        raise InvalidArgument(f"{_NAME}.disable_any_whitespace must be true or false")
    if pattern is not None and (not isinstance(pattern, str) or not pattern or not is_unicode(pattern)):
        raise InvalidArgument(f"{_NAME}.whitespace_pattern must be a regular expression, not {shorten(pattern)}")
    if (pattern is not None or compact) and kind != "json":
        raise InvalidArgument(f"{_NAME}.whitespace_pattern and disable_any_whitespace go with json only")
    if pattern is not None and compact:
        raise InvalidArgument(f"{_NAME} has whitespace_pattern beside disable_any_whitespace")
    return COMPACT if compact else pattern


def _closes(given: dict[str, Any], kind: GrammarKind) -> bool:
    closes = bool_of(given.get("close_json", False))
    if closes is None:
        raise InvalidArgument(f"{_NAME}.close_json must be true or false, not {shorten(given['close_json'])}")
    if closes and kind != "json":
        raise InvalidArgument(f"{_NAME}.close_json goes with json and json_object only")
    return closes


_READERS = {
    "json": _schema,
    "json_object": _any_object,
    "regex": _text("regex"),
    "choice": _choice,
    "grammar": _text("grammar"),
}
