"""The form that an answer must have, as the engine takes it: from OpenAI's fields, and for a tool that must be called.

A call is a JSON object whose arguments keep to the tool's schema, in one of two formats, between which the model
chooses with its first token: Hermes' and Qwen's tags, or the bare object of Llama 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from . import parameters
from .errors import ApiError, invalid

Tools = Sequence[Mapping[str, Any]]

_MOST_CALLS = 16
# The engine's own default applies to whole schemas; here they are parts of a grammar, which say it themselves.
_WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A]{1,8}"}
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def add_form(params: dict[str, Any], form: dict[str, Any] | None, field: str) -> None:
    """Add to sampling parameters what a field asks for. Raises ApiError if another one asks, too."""
    if form is None:
        return
    if params.get("structured_outputs") is not None:
        raise invalid(field, f"{field} cannot go with another field that asks for a form of the answer")
    params["structured_outputs"] = form


def response_format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of chat and of text completions. Raises ApiError."""
    wanted, holder = parameters.read(body, "response_format", dict, {}), "response_format"
    if wanted.get("type") == "json_schema":
        holder = "response_format.json_schema"
        wanted = {**parameters.read(wanted, "json_schema", dict, {}), "type": "json_schema"}
    form = _form(wanted, "response_format", holder)
    if parameters.read(body, "close_json", bool, False):
        if form is None:
            raise invalid("close_json", "close_json goes with a response_format of json_object or json_schema")
        form["close_json"] = True
    return form


def text_format(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of the Responses API. Raises ApiError."""
    text = parameters.read(body, "text", dict, {})
    if unknown := next((name for name in text if name != "format" and text[name] is not None), None):
        raise invalid("text", f"text.{unknown[:64]}: this engine does not support it", "unsupported_parameter")
    return _form(parameters.read(text, "format", dict, {}), "text.format", "text.format")


def _form(wanted: Mapping[str, Any], field: str, holder: str) -> dict[str, Any] | None:
    """A schema is enforced whether it is called strict or not: clients rely on it."""
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise invalid(field, f"{field}.type must be text, json_object or json_schema")
    if not isinstance(wanted.get("schema"), dict):
        raise invalid(f"{holder}.schema", f"{holder}.schema must be an object")
    return {"json": wanted["schema"]}


def must_call(choice: Any, tools: Tools) -> Tools | None:
    """Of OpenAI's `tool_choice`: the tools of which one must be called, or None. Raises ApiError."""
    if choice is None or choice in ("auto", "none"):
        return None
    if choice == "required":
        if not tools:
            raise invalid("tool_choice", "tool_choice: there are no tools to choose from")
        return tools
    if not isinstance(choice, dict) or choice.get("type") != "function":
        raise invalid("tool_choice", "tool_choice must be none, auto, required or an object of type function")
    function = choice.get("function", choice)  # the Responses API has the name beside the type
    return named_tool(function.get("name") if isinstance(function, dict) else None, tools)


def named_tool(name: Any, tools: Tools) -> Tools:
    """Raises ApiError if there is no such tool."""
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise invalid("tool_choice", f"tool_choice: there is no tool {str(name)[:64]!r}")
    return found[:1]


def call_form(tools: Tools, parallel: bool) -> dict[str, Any]:
    """At least one call of these tools; `parallel`: more may follow. Raises ApiError for a schema that is none."""
    rules = []
    for index, tool in enumerate(tools):
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or _NO_PARAMETERS
        if not isinstance(schema, dict):
            raise _bad_schema(index)
        try:
            arguments = json.dumps({**schema, "x-guidance": _WHITESPACE}, allow_nan=False)
        except (ValueError, RecursionError):
            raise _bad_schema(index) from None
        rules += [
            f"name{index}: {_literal(json.dumps(name))}",
            f"arguments{index}: %json {arguments}",
        ]
    more = f"{{0,{_MOST_CALLS - 1}}}"
    calls = f'tagged ("\\n" tagged){more} | bare ("; " bare){more}' if parallel else "tagged | bare"
    tagged = " | ".join(_call(index, "arguments") for index in range(len(tools)))
    bare = " | ".join(_call(index, "parameters") for index in range(len(tools)))
    opening, closing = _literal("<tool_call>\n"), _literal("\n</tool_call>")
    grammar = [
        f"start: {calls}",
        f"tagged: {opening} ({tagged}) {closing}",
        f"bare: {bare}",
        *rules,
    ]
    return {"grammar": "\n".join(grammar)}


def _call(index: int, key: str) -> str:
    opening, middle = _literal('{"name": '), _literal(f', "{key}": ')
    return f'{opening} name{index} {middle} arguments{index} "}}"'


def _literal(text: str) -> str:
    """A string of Lark is written as in JSON."""
    return json.dumps(text)


def _bad_schema(index: int) -> ApiError:
    return invalid(f"tools[{index}].function.parameters", f"tools[{index}].function.parameters must be a JSON schema")
