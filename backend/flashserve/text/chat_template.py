"""Chat messages to a prompt, with the model's own Jinja template, rendered as transformers does.

Templates come with the model and are not trusted: they run in jinja2's immutable sandbox and see plain JSON values
only. Messages come from clients; whatever a template makes of wrong ones is an InvalidArgument.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flashserve.errors import InvalidArgument
from flashserve.text.strict_json import type_name

log = logging.getLogger(__name__)

REQUEST_KEYS = ("messages", "tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")
RESERVED_KWARGS = (*REQUEST_KEYS, "chat_template", "tokenize")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class ChatRequest:
    """A checked chat_request."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    kwargs: dict[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], field: str = "chat_request") -> ChatRequest:
        """Check the keys and types of a parsed chat_request. Raises InvalidArgument."""
        for key in values:
            if key not in REQUEST_KEYS:
                raise InvalidArgument(f"unknown key {key[:60]!r} in {field}; it takes {', '.join(REQUEST_KEYS)}")
        proceed = _typed(values, "continue_final_message", bool, False, field)
        generation_prompt = _typed(values, "add_generation_prompt", bool, not proceed, field)
        if proceed and generation_prompt:
            raise InvalidArgument(f"{field}: add_generation_prompt and continue_final_message exclude each other")
        messages = _typed(values, "messages", list, [], field)
        if not messages:
            raise InvalidArgument(f"{field}.messages must be a list of at least one message")
        tools = _typed(values, "tools", list, None, field)
        for index, tool in enumerate(tools or ()):
            if not isinstance(tool, dict):
                raise InvalidArgument(f"{field}.tools[{index}] must be an object, not {type_name(tool)}")
        kwargs = _typed(values, "chat_template_kwargs", dict, {}, field)
        for key in RESERVED_KWARGS:
            if key in kwargs:
                raise InvalidArgument(f"{field}.chat_template_kwargs must not hold {key}")
        return cls(
            messages=[_message(m, f"{field}.messages[{i}]") for i, m in enumerate(messages)],
            tools=tools or None,  # many templates ask only whether there is a list
            kwargs=kwargs,
            add_generation_prompt=generation_prompt,
            continue_final_message=proceed,
        )


def _typed(values: Mapping[str, Any], key: str, kind: type, default: Any, field: str) -> Any:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise InvalidArgument(f"{field}.{key} must be {type_name(kind())}, not {type_name(value)}")
    return value


def _message(message: Any, field: str) -> dict[str, Any]:
    """A message without its null keys: many templates print "None" for them, or fail."""
    if not isinstance(message, dict):
        raise InvalidArgument(f"{field} must be an object, not {type_name(message)}")
    message = {key: value for key, value in message.items() if value is not None}
    may_lack_content = "tool_calls" in message
    if message.get("tool_calls") == []:  # no call; templates that take one at most would count it
        del message["tool_calls"]
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise InvalidArgument(f"{field}.role must be a non-empty string")
    content = message.get("content")
    if content is None:
        if not may_lack_content:
            raise InvalidArgument(f"{field}.content must be a string or a list of text parts")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{field}.content[{index}]")
    elif not isinstance(content, str):
        raise InvalidArgument(f"{field}.content must be a string or a list of text parts, not {type_name(content)}")
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{field}.tool_calls")
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is not None:  # templates differ in the name they read
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def _check_part(part: Any, field: str) -> None:
    if not isinstance(part, dict):
        raise InvalidArgument(f'{field} must be an object like {{"type": "text", "text": ...}}, not {type_name(part)}')
    kind = part.get("type")
    if kind != "text":
        shown = repr(kind[:60]) if isinstance(kind, str) else type_name(kind)
        raise InvalidArgument(f"{field} is of type {shown}; only text is supported, images are not")
    if not isinstance(part.get("text"), str):
        raise InvalidArgument(f"{field}.text must be a string")


def _tool_calls(calls: Any, field: str) -> list[Any]:
    """OpenAI's API has a call's arguments as a JSON string; templates expect the object (vLLM converts it, too)."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidArgument(f"{field} must be a list of objects")
    result = []
    for index, call in enumerate(calls):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                arguments = json.loads(function["arguments"] or "{}")
            except (ValueError, RecursionError):
                raise InvalidArgument(f"{field}[{index}].function.arguments is not valid JSON") from None
            call = {**call, "function": {**function, "arguments": arguments}}
        result.append(call)
    return result


class ChatTemplate:
    """The templates of one model: usually one, some have a second for requests with tools."""

    def __init__(self, source: Any, special_tokens: Mapping[str, str]) -> None:
        """``source``: ``chat_template`` of tokenizer_config.json: a string, several by name, or None."""
        if isinstance(source, list):
            source = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
        elif not isinstance(source, dict):
            source = {} if source is None else {"default": source}
        self._special_tokens = dict(special_tokens)
        self._broken = ""
        self._templates = {name: template for name, text in source.items() if (template := self._compile(name, text))}

    def _compile(self, name: str, text: Any) -> _Compiled | None:
        """None for a template that does not parse: text prompts do not need it, so the model is served all the same."""
        try:
            return _Compiled(text)
        except Exception as error:  # a syntax error, or no string at all
            self._broken = f"the model's chat template {name!r} does not parse: {_words(error)}"
            log.warning(self._broken)
            return None

    def render(self, request: ChatRequest) -> str:
        """The prompt. It holds the model's special tokens already. Raises InvalidArgument."""
        name = "tool_use" if request.tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise InvalidArgument(f"{self._broken or 'the model has no chat template'}; send text_input instead")
        compiled = self._templates[name]
        messages = [compiled.adapt(message) for message in request.messages]
        if request.continue_final_message:
            messages[-1] = _tagged(messages[-1])
        values: dict[str, Any] = {"documents": None, **self._special_tokens, **request.kwargs}
        try:
            text = compiled.template.render(
                values,
                messages=messages,
                tools=request.tools,
                add_generation_prompt=request.add_generation_prompt,
            )
        except Exception as error:  # a template can raise anything: raise_exception, undefined names, wrong types
            raise InvalidArgument(f"the chat template refused the request: {_words(error)}") from error
        return _cut_at_tag(text) if request.continue_final_message else text


def _words(error: Exception) -> str:
    words = str(error) or type(error).__name__
    return words[:300].encode("utf-8", "replace").decode()


def _tagged(message: dict[str, Any]) -> dict[str, Any]:
    """The final message with a mark behind its text, so that the rendered prompt can be cut there."""
    content = message.get("content")
    if isinstance(content, list) and content:
        return {**message, "content": [*content[:-1], {**content[-1], "text": content[-1]["text"] + CONTINUE_TAG}]}
    if not isinstance(content, str):
        raise InvalidArgument("continue_final_message needs a final message with text content")
    return {**message, "content": content + CONTINUE_TAG}


def _cut_at_tag(text: str) -> str:
    """As in transformers: a template that trims messages has also eaten the space behind the mark."""
    at = text.rfind(CONTINUE_TAG.strip())
    if at < 0:
        raise InvalidArgument("continue_final_message: the chat template leaves the final message out")
    exact = text.startswith(CONTINUE_TAG, at)
    return text[:at] if exact else text[:at].rstrip()


# --- the environment ---------------------------------------------------------------------------------------


class _GenerationTag(Extension):
    """``{% generation %}`` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it without ClassVar)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Compiled:
    """A template, and whether it handles content that comes as a list of parts."""

    def __init__(self, text: str) -> None:
        environment = _environment()
        self.template = environment.from_string(text)
        self._takes_parts = _iterates_content(environment.parse(text))

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with its content in the form the template reads: most add strings to it."""
        content = message.get("content")
        if isinstance(content, list) and not self._takes_parts:
            return {**message, "content": "\n".join(part["text"] for part in content)}
        return message


def _iterates_content(tree: nodes.Template) -> bool:
    """Whether a loop of the template runs over a message's content, or over a name that was set to it."""

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter | nodes.Test) and node.node is not None:
            return is_content(node.node)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Name) and node.name in names

    names = {"content"}  # also what macros call their argument
    for assignment in tree.find_all(nodes.Assign):
        if isinstance(assignment.target, nodes.Name) and is_content(assignment.node):
            names.add(assignment.target.name)
    return any(is_content(loop.iter) for loop in tree.find_all(nodes.For))
