"""What a request may ask of its text's form, as far as no compiler is needed."""

from __future__ import annotations

import json

import pytest

from flashserve.errors import InvalidArgument
from flashserve.protocol import SamplingParams, StructuredOutputs
from flashserve.sampling_params import parse_sampling_params
from flashserve.structured_outputs import COMPACT, MAX_BYTES

SCHEMA = {"type": "object", "properties": {"z": {"type": "string"}, "a": {}}, "required": ["z"]}
WRITTEN = json.dumps(SCHEMA)


def parse(value: object) -> StructuredOutputs | None:
    return parse_sampling_params({"structured_outputs": value}).structured_outputs


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"json": SCHEMA}, StructuredOutputs("json", WRITTEN)),
        ({"json": WRITTEN}, StructuredOutputs("json", WRITTEN)),
        (json.dumps({"json": SCHEMA}), StructuredOutputs("json", WRITTEN)),
        ({"json": True}, StructuredOutputs("json", "true")),
        ({"json_object": True}, StructuredOutputs("json", '{"type": "object"}')),
        ({"json_object": True, "close_json": "true"}, StructuredOutputs("json", '{"type": "object"}', close_json=True)),
        ({"regex": "[0-9]+"}, StructuredOutputs("regex", "[0-9]+")),
        ({"choice": ["ja", "né"]}, StructuredOutputs("choice", '["ja", "né"]')),
        ({"grammar": 'start: "a"'}, StructuredOutputs("grammar", 'start: "a"')),
        ({"json": {}, "whitespace_pattern": " ?"}, StructuredOutputs("json", "{}", " ?")),
        ({"json": {}, "disable_any_whitespace": True}, StructuredOutputs("json", "{}", COMPACT)),
        ({"regex": "a", "json": None, "disable_fallback": True}, StructuredOutputs("regex", "a")),
    ],
)
def test_every_form(given, expected):
    assert parse(given) == expected


def test_properties_keep_their_order():
    parsed = parse({"json": SCHEMA})
    assert parsed is not None
    assert list(json.loads(parsed.text)["properties"]) == ["z", "a"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("x", "structured_outputs must be an object"),
        (5, "structured_outputs must be an object"),
        ({}, "exactly one of json, json_object, regex, choice, grammar"),
        ({"json": None}, "exactly one of"),
        ({"json": {}, "regex": "a"}, "not json and regex"),
        ({"xml": "a"}, "unknown key 'xml'"),
        ({"structural_tag": {}, "json": {}}, "structured_outputs.structural_tag={} is not supported"),
        ({"disable_additional_properties": True, "json": {}}, "disable_additional_properties=True is not supported"),
        ({"json": 5}, "structured_outputs.json must be a JSON schema"),
        ({"json": "{"}, "structured_outputs.json is not valid JSON"),
        ({"json": {"const": float("nan")}}, "structured_outputs.json cannot be written as JSON"),
        ({"json_object": False}, "structured_outputs.json_object may only be true"),
        ({"regex": ""}, "structured_outputs.regex must be a non-empty string"),
        ({"regex": "\ud800"}, "structured_outputs.regex has a lone surrogate"),
        ({"regex": "a" * (MAX_BYTES + 1)}, f"has {MAX_BYTES + 1} bytes; at most {MAX_BYTES}"),
        ({"choice": []}, "structured_outputs.choice must be a non-empty list"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must be a non-empty list"),
        ({"choice": "a"}, "structured_outputs.choice must be a non-empty list"),
        ({"regex": "a", "whitespace_pattern": " "}, "go with json only"),
        ({"regex": "a", "close_json": True}, "structured_outputs.close_json goes with json and json_object only"),
        ({"json": {}, "close_json": "maybe"}, "structured_outputs.close_json must be true or false"),
        ({"json": {}, "whitespace_pattern": 5}, "whitespace_pattern must be a regular expression"),
        ({"json": {}, "disable_any_whitespace": "maybe"}, "disable_any_whitespace must be true or false"),
        ({"json": {}, "disable_any_whitespace": True, "whitespace_pattern": " "}, "beside disable_any_whitespace"),
    ],
)
def test_what_is_wrong_is_named(given, words):
    with pytest.raises(InvalidArgument, match=words):
        parse(given)


def test_nested_beyond_all_bounds():
    text = "[" * 100_000
    with pytest.raises(InvalidArgument, match=r"structured_outputs.json"):
        parse({"json": text})


def test_allowed_tokens():
    assert parse_sampling_params({"allowed_token_ids": "[5, 7]"}) == SamplingParams(allowed_token_ids=(5, 7))
    with pytest.raises(InvalidArgument, match="allowed_token_ids must have at least one entry"):
        parse_sampling_params({"allowed_token_ids": []})
    with pytest.raises(InvalidArgument, match="allowed_token_ids cannot go with structured_outputs"):
        parse_sampling_params({"allowed_token_ids": [5], "structured_outputs": {"json_object": True}})


@pytest.mark.parametrize("name", ["guided_json", "guided_regex", "guided_choice", "guided_grammar"])
def test_older_names_are_refused_with_the_newer(name):
    with pytest.raises(InvalidArgument, match=f'{name}.*structured_outputs={{"{name.removeprefix("guided_")}": …}}'):
        parse_sampling_params({name: "x"})


def test_what_closes_a_text_has_no_logprobs():
    with pytest.raises(InvalidArgument, match=r"structured_outputs.close_json cannot go with logprobs"):
        parse_sampling_params({"structured_outputs": {"json": {}, "close_json": True}, "logprobs": 0})
