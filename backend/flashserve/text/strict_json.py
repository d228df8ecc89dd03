"""JSON from clients: one way to read it, and one error for everything that can be wrong with it."""

from __future__ import annotations

import json
from typing import Any

from flashserve.errors import InvalidArgument


def parse_object(text: str, field: str) -> dict[str, Any]:
    """The JSON object in ``text``. ``field`` names the input in the error.

    Stricter than ``json.loads``: no NaN or Infinity, no key twice (the second would silently win), an object at the
    top. Raises InvalidArgument.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except InvalidArgument as error:
        raise InvalidArgument(f"{field} {error.message}") from None
    except RecursionError:
        raise InvalidArgument(f"{field} is nested too deeply") from None
    except ValueError as error:  # malformed, or an integer of more digits than Python converts
        raise InvalidArgument(f"{field} is not valid JSON: {str(error).split(';')[0]}") from None
    if not isinstance(value, dict):
        raise InvalidArgument(f"{field} must be a JSON object, not {type_name(value)}")
    return value


def type_name(value: Any) -> str:
    """What JSON calls the value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise InvalidArgument(f"has the key {key[:60]!r} twice")
            seen.add(key)
    return result


def _no_constant(name: str) -> Any:
    raise InvalidArgument(f"holds {name}, which is not JSON")
