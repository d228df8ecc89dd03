"""Random JSON schemas and regular expressions, whose random texts end soon."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("id", "name", "größe", "tags", "x y", "a.b", "count", "$ref", "nested", 'quo"te', "é\\n", "type")
PATTERNS = ("^[a-z]{1,8}$", r"^\d{3}-\d{2}$", "^(ab|cd){1,3}$", "^[A-Z][a-z]{0,5}( [A-Z]){0,2}$", "^é?x{2,4}$")
FORMATS = ("date", "time", "uuid", "ipv4")


def random_schema(rng: random.Random) -> Schema:
    """Nested objects and arrays, enums, constants, references, patterns, bounds, unions."""
    names = [f"def{index}" for index in range(rng.randint(0, 3))]
    # A definition refers to later ones only, but for one that may hold itself as often as it likes.
    defs = {name: _value(rng, 1, names[index + 1 :]) for index, name in enumerate(names)}
    if rng.random() < 0.3:
        node = {"value": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}
        defs["node"] = {
            "type": "object", "properties": node, "required": ["value", "next"], "additionalProperties": False,
        }  # fmt: skip
        names.append("node")
    schema = _value(rng, 3, names) if rng.random() < 0.3 else _object(rng, 3, names)
    return {**schema, "$defs": defs} if defs else schema


def _value(rng: random.Random, depth: int, names: list[str]) -> Schema:
    leaves = [_string, _integer, _number, _enum, _simple]
    branches = [_object, _array, _union] if depth else []
    if names and rng.random() < 0.2:
        return {"$ref": f"#/$defs/{rng.choice(names)}"}
    return rng.choice([*leaves, *branches])(rng, depth - 1, names)


def _object(rng: random.Random, depth: int, names: list[str]) -> Schema:
    keys = rng.sample(WORDS, rng.randint(0, 4))
    schema: Schema = {
        "type": "object",
        "properties": {key: _value(rng, depth, names) for key in keys},
        "required": [key for key in keys if rng.random() < 0.6],
        "additionalProperties": False,
    }
    return {**schema, "title": "A thing", "description": "…"} if rng.random() < 0.3 else schema


def _array(rng: random.Random, depth: int, names: list[str]) -> Schema:
    low = rng.randint(0, 2)
    schema: Schema = {"type": "array", "items": _value(rng, depth, names), "minItems": low, "maxItems": low + 2}
    if rng.random() < 0.3:
        schema["prefixItems"] = [_value(rng, depth, names)]
    return schema


def _union(rng: random.Random, depth: int, names: list[str]) -> Schema:
    return {"anyOf": [_value(rng, depth, names) for _ in range(rng.randint(1, 3))]}


def _string(rng: random.Random, depth: int, names: list[str]) -> Schema:
    kind = rng.random()
    if kind < 0.3:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind < 0.5:
        return {"type": "string", "format": rng.choice(FORMATS)}
    low = rng.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 8)}


def _integer(rng: random.Random, depth: int, names: list[str]) -> Schema:
    low = rng.randint(-1000, 1000)
    schema: Schema = {"type": "integer", "minimum": low, "maximum": low + rng.randint(20, 5000)}
    return {**schema, "multipleOf": rng.choice((2, 5))} if rng.random() < 0.2 else schema


def _number(rng: random.Random, depth: int, names: list[str]) -> Schema:
    low = rng.uniform(-10, 10)
    return {"type": "number", "exclusiveMinimum": round(low, 2), "maximum": round(low + rng.uniform(1, 50), 2)}


def _enum(rng: random.Random, depth: int, names: list[str]) -> Schema:
    values = ["red", "grün", "", 'a "quote"', 7, -1.5, None, True, [1, "x"], {"k": []}]
    return {"const": rng.choice(values)} if rng.random() < 0.3 else {"enum": rng.sample(values, rng.randint(1, 5))}


def _simple(rng: random.Random, depth: int, names: list[str]) -> Schema:
    return rng.choice(({"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}))


def random_regex(rng: random.Random, depth: int = 3) -> str:
    """Of what Python and llguidance read alike."""
    atoms = ("a", "b", "é", "0", " ", r"\.", "[a-f]", "[^x\\n]", "[0-9]", "[A-Z0-9_]", "日")
    kind = rng.random() if depth else 0.0
    if kind < 0.3:
        return rng.choice(atoms)
    if kind < 0.6:
        return "".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 4)))
    if kind < 0.8:
        return "(" + "|".join(random_regex(rng, depth - 1) for _ in range(rng.randint(1, 3))) + ")"
    low = rng.randint(0, 2)
    return f"({random_regex(rng, depth - 1)}){rng.choice(('?', f'{{{low},{low + 3}}}', f'{{{low + 1}}}'))}"
