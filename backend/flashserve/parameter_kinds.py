"""What a parameter of a request accepts, in what spellings, and what is said of a value that it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from flashserve.coercion import bool_of, integer_of, is_unicode, list_of, number_of, plain, shorten
from flashserve.errors import InvalidArgument
from flashserve.protocol import GREEDY_BELOW
from flashserve.structured_outputs import RANGE, parse_structured_outputs

Kind = Literal["int", "float", "bool", "str", "str_list", "int_list", "token_map", "structure"]

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Parameter:
    """What one parameter accepts. ``low`` and ``high`` bound a number, a list's entries, or nothing (None)."""

    name: str
    kind: Kind
    low: float | None = None
    high: float | None = None
    above_low: bool = False
    """``low`` itself is excluded."""
    also: tuple[int, ...] = ()
    """Values below ``low`` that are accepted, too."""
    max_items: int | None = None
    max_length: int | None = None
    """Of a string, in characters."""
    may_be_empty: bool = False
    """Of strings: the text "[]" is the list of none, not an entry."""
    off: tuple[Any, ...] = ()
    """Values of another type that mean the same as null."""
    of_request: bool = False
    """Belongs to RequestOptions instead of SamplingParams."""

    def range(self) -> str:
        """The accepted values, in words for an error message."""
        numbers = ""
        if self.low is not None and self.high is not None:
            numbers = f" in {'(' if self.above_low else '['}{_number(self.low)}, {_number(self.high)}]"
        extra = f" or {', '.join(map(str, self.also))}" if self.also else ""
        if self.kind == "int":
            return f"an integer{numbers}{extra}"
        if self.kind == "float":
            return f"a number{numbers}"
        if self.kind == "bool":
            return "true or false"
        if self.kind == "str":
            return f"a string of at most {self.max_length} printable characters"
        if self.kind == "token_map":
            return f"an object of at most {self.max_items} token ids, each with a number{numbers}"
        if self.kind == "str_list":
            return f"a string or a list of at most {self.max_items} strings, each of 1 to {self.max_length} characters"
        if self.kind == "structure":
            return RANGE
        most = f"at most {self.max_items} " if self.max_items else ""
        return f"a list of {most}integers{numbers}"


def coerce(parameter: Parameter, value: Any) -> Any:
    """The value in the parameter's type. Raises InvalidArgument with its name and its range."""
    return COERCIONS[parameter.kind](parameter, value)


def _number(value: float) -> str:
    """Powers of two are easier to read as such."""
    for power in (31, 63):
        for offset in (0, -1):
            if abs(value) == 2**power + offset and isinstance(value, int):
                return f"{'-' if value < 0 else ''}2^{power}{'-1' if offset else ''}"
    return f"{value:g}"


def _refuse(parameter: Parameter, value: Any, why: str = "") -> InvalidArgument:
    return InvalidArgument(f"{parameter.name} must be {parameter.range()}, not {shorten(value)}{why}")


def _int(parameter: Parameter, value: Any) -> int:
    number = integer_of(value)
    if number is None:
        rounded = isinstance(given := number_of(value), float) and given.is_integer()
        raise _refuse(parameter, value, " (integers of 2^63 and more arrive rounded)" if rounded else "")
    _check_range(parameter, number, value)
    return number


def _float(parameter: Parameter, value: Any) -> float:
    number = number_of(value)
    if number is None:
        raise _refuse(parameter, value)
    _check_range(parameter, number, value)  # before float(): an int of 400 digits overflows
    number = float(number)
    return 0.0 if parameter.name == "temperature" and number < GREEDY_BELOW else number


def _check_range(parameter: Parameter, number: float, value: Any) -> None:
    low, high = parameter.low, parameter.high
    assert low is not None and high is not None
    inside = low <= number <= high and not (parameter.above_low and number == low)  # False for NaN
    if not inside and number not in parameter.also:
        raise _refuse(parameter, value)


def _bool(parameter: Parameter, value: Any) -> bool:
    flag = bool_of(value)
    if flag is None:
        raise _refuse(parameter, value)
    return flag


def _str(parameter: Parameter, value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and parameter.name == "id":
        value = str(value) if abs(value) <= INT64_MAX else value  # generate accepts numbers as ids
    # Printable only: these end up in logs and metrics; this refuses lone surrogates as well.
    if not isinstance(value, str) or len(value) > (parameter.max_length or 0) or not value.isprintable():
        raise _refuse(parameter, value)
    return value


def _str_list(parameter: Parameter, value: Any) -> tuple[str, ...]:
    """A string is one entry, unless it spells a JSON list of strings; "[" is an entry, and for most "[]" is, too."""
    if isinstance(value, str):
        spelled = list_of(value, str)
        value = spelled if spelled or (spelled is not None and parameter.may_be_empty) else [value]
    if not isinstance(value, (list, tuple)):
        raise _refuse(parameter, value)
    assert parameter.max_items is not None and parameter.max_length is not None
    if len(value) > parameter.max_items:
        raise _refuse(parameter, value)
    for item in value:
        if not isinstance(item, str) or not 1 <= len(item) <= parameter.max_length:
            raise InvalidArgument(f"{parameter.name} must be {parameter.range()}; one entry is {shorten(item)}")
        if not is_unicode(item):
            raise InvalidArgument(f"{parameter.name} has an entry with a lone surrogate: {shorten(item)}")
    return tuple(value)


def _int_list(parameter: Parameter, given: Any) -> list[int] | tuple[int, ...]:
    """A tuple for SamplingParams; prompts stay lists, as msgspec and the tokenizer take them."""
    value = list_of(given, object)
    if value is None:
        raise _refuse(parameter, given)
    if parameter.max_items is not None and len(value) > parameter.max_items:
        raise _refuse(parameter, value)
    # A prompt may have 100k entries: look at them one by one only if something is wrong.
    low, high = parameter.low, parameter.high
    assert low is not None and high is not None
    if not all(type(item) is int for item in value) or (value and not low <= min(value) <= max(value) <= high):
        bad = next(item for item in value if type(item) is not int or not low <= item <= high)
        raise InvalidArgument(f"{parameter.name} must be {parameter.range()}; one entry is {shorten(bad)}")
    return list(value) if parameter.of_request else tuple(value)


def _token_map(parameter: Parameter, given: Any) -> dict[int, float]:
    """JSON has strings as keys only."""
    value = plain(given)
    assert parameter.max_items is not None
    if not isinstance(value, dict) or len(value) > parameter.max_items:
        raise _refuse(parameter, value)
    found: dict[int, float] = {}
    for key, number in value.items():
        token_id, bias = integer_of(key), number_of(number)
        if token_id is None or not 0 <= token_id <= INT32_MAX or token_id in found or bias is None:
            raise InvalidArgument(
                f"{parameter.name} must be {parameter.range()}; one entry is {shorten(key)}: {shorten(number)}"
            )
        _check_range(parameter, bias, {key: number})
        found[token_id] = float(bias)
    return found


COERCIONS: dict[Kind, Callable[[Parameter, Any], Any]] = {
    "int": _int,
    "float": _float,
    "bool": _bool,
    "str": _str,
    "str_list": _str_list,
    "int_list": _int_list,
    "token_map": _token_map,
    "structure": lambda _, value: parse_structured_outputs(value),
}
