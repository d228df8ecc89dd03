"""What a value says that may have come as text. Request parameters and model.json share these rules.

Clients that only know strings, load generators and hand-written files spell numbers as "100", booleans as "True" and
lists as "[1, 2]". Each function returns None for what does not say such a thing, so None itself never does.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

EXACT_FLOAT = 2**53  # every integer up to here is a float, exactly
_NUMBER = re.compile(r"[+-]?(\d+|\d+\.\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_MAX_DIGITS = 64


def number_of(value: Any) -> int | float | None:
    """An int or a finite-or-not float as it is, or the number that a short text spells; booleans are no numbers.

    Python's own rules for text would let "1_0" and "nan" pass.
    """
    if isinstance(value, str):
        text = value.strip()
        if len(text) > _MAX_DIGITS or not _NUMBER.fullmatch(text):
            return None
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def integer_of(value: Any) -> int | None:
    """An integer, also as 4.0 or "4"; None beyond 2^53 for a float, which has been rounded by then."""
    number = number_of(value)
    if isinstance(number, float):
        whole = math.isfinite(number) and number.is_integer() and abs(number) <= EXACT_FLOAT
        return int(number) if whole else None
    return number


def bool_of(value: Any) -> bool | None:
    """A boolean, also as "true" or "False"; numbers are none."""
    if isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower())
    return value if isinstance(value, bool) else None


def list_of(value: Any, entry: type) -> list[Any] | tuple[Any, ...] | None:
    """A list, or the JSON list that a text spells if all its entries are of the type."""
    if not isinstance(value, str):
        return value if isinstance(value, (list, tuple)) else None
    if not value.lstrip().startswith("["):
        return None
    found = _json(value)
    return found if isinstance(found, list) and all(isinstance(item, entry) for item in found) else None


def plain(value: Any) -> Any:
    """What a text spells in JSON or in Python's words for it ("True", "None"); everything else as it is."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None}
    text = value.strip().lower()
    return words[text] if text in words else _json(value)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def same(one: Any, other: Any) -> bool:
    """Equal, and not as Python has it that False is 0."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def is_unicode(text: str) -> bool:
    """Whether the text has a UTF-8 form; JSON escapes can spell lone surrogates, which have none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shorten(value: Any, limit: int = 60) -> str:
    """``repr`` of a value for an error message, cut in the middle. Always printable, so always valid UTF-8."""
    if isinstance(value, str) and len(value) > limit:
        value = value[:limit] + "..."  # repr of a 100 MB string would take as long as reading it
    elif isinstance(value, (list, dict)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value)} entries"
    elif isinstance(value, int) and abs(value) >= 10**limit:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a deeply nested {type(value).__name__}"
    return text if len(text) <= limit + 5 else f"{text[: limit - 10]}...{text[-10:]}"
