"""Structured outputs that are to be refused with a reason, in little time: by what is wrong with them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def exploding_unions(depth: int) -> Schema:
    """llguidance takes three times as long with each level, 1 s with 6; 8 are too many symbols for it."""
    if not depth:
        return {"type": "object"}
    union = [{"properties": {f"p{depth}{low}": {"type": "integer", "minimum": low}}} for low in range(3)]
    return {"allOf": [{"anyOf": union}, exploding_unions(depth - 1)]}


def nested(depth: int, inner: Schema, key: str = "items") -> Schema:
    """Arrays in each other; with another key what that has inside."""
    schema = inner
    for _ in range(depth):
        if key == "items":
            schema = {"type": "array", "items": schema}
        elif key == "properties":
            schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
        else:
            schema = {key: [schema]}
    return schema


def of_type(kind: str, **options: Any) -> dict[str, Any]:
    return {"json": {"type": kind, **options}}


IN_A_CIRCLE = {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}
HOSTILE: dict[str, dict[str, Any]] = {
    **{f"unions that explode, {depth} deep": {"json": exploding_unions(depth)} for depth in (7, 8, 9, 10, 12, 16, 24)},
    "arrays nested 200 deep": {"json": nested(200, {"type": "null"})},
    "arrays nested 900 deep": {"json": nested(900, {"type": "null"})},
    "objects nested 200 deep": {"json": nested(200, {"type": "null"}, "properties")},
    "unions nested 200 deep": {"json": nested(200, {"type": "null"}, "anyOf")},
    "intersections nested 200 deep": {"json": nested(200, {"type": "null"}, "allOf")},
    "a reference to itself": {"json": {"$ref": "#"}},
    "references in a circle": {"json": {"$ref": "#/$defs/a", "$defs": IN_A_CIRCLE}},
    "a union of references to itself": {"json": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}},
    "a remote reference": {"json": {"$ref": "https://example.com/schema.json"}},
    "a reference to a file": {"json": {"$ref": "file:///etc/passwd"}},
    "a reference to nothing": {"json": {"$ref": "#/$defs/nothing"}},
    "a reference that is a number": {"json": {"$ref": 5}},
    "not": {"json": {"not": {"type": "string"}}},
    "if": {"json": {"if": {"type": "string"}, "then": {"minLength": 1}}},
    "unique items": of_type("array", uniqueItems=True),
    "contains": of_type("array", contains={"type": "null"}),
    "dependencies": of_type("object", dependentRequired={"a": ["b"]}),
    "names of properties": of_type("object", propertyNames={"pattern": "^a"}),
    "an unknown format": of_type("string", format="of my own"),
    "a type that is none": of_type("text"),
    "a type that is a number": {"json": {"type": 5}},
    "an enum that is an object": {"json": {"enum": {"a": 1}}},
    "an enum without values": {"json": {"enum": []}},
    "a bound that is a text": of_type("integer", minimum="a"),
    "a length that is negative": of_type("string", minLength=-1),
    "no integer can be so": of_type("integer", minimum=5, maximum=4),
    "no text can be so": of_type("string", minLength=5, maxLength=4),
    "no array can be so": of_type("array", minItems=5, maxItems=4),
    "a pattern that is none": of_type("string", pattern="(a"),
    "a pattern that looks ahead": of_type("string", pattern="(?=a)b"),
    "look-ahead": {"regex": "(?=a)b"},
    "look-behind": {"regex": "(?<!a)b"},
    "a reference in a regular expression": {"regex": r"(a)\1"},
    "a regular expression that is none": {"regex": "(a"},
    "a repetition the wrong way round": {"regex": "a{5,2}"},
    "a class that is not closed": {"regex": "[a"},
    "a repetition of nothing": {"regex": "*a"},
    "no grammar": {"grammar": "hello"},
    "a rule that is not there": {"grammar": "start: other"},
    "a grammar without a start": {"grammar": 'other: "a"'},
    "a special token that is not there": {"grammar": "start: <|nothing|>"},
    "a rule that is there twice": {"grammar": 'start: "a"\nstart: "b"'},
    "a terminal that calls itself": {"grammar": 'start: A\nA: "a" A'},
    "a text that is not closed": {"grammar": 'start: "a'},
    "a grammar that includes a file": {"grammar": '%import ./file.lark\nstart: "a"'},
}
