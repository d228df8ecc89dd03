"""Anthropic's Messages API: its requests as chat requests, and the answer in its forms."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

import orjson

from flashserve_client import GenerateResult

from . import parameters, structure
from .chat import ChatRequest, make_reader, new_call_id, read_message, template_of, tool_params
from .errors import invalid
from .gateway import Call
from .incoming import is_nested_deeply
from .output.events import CallArguments, CallStart, Event, Reasoning, Text
from .pool import Answer, Ask

_OWN = frozenset({"model", "messages", "system", "max_tokens", "stop_sequences", "stream", "tools", "tool_choice",
                  "thinking", "thread"})  # fmt: skip
_SAMPLING = frozenset({"temperature", "top_p", "top_k"})
# Of Anthropic's service, and without a meaning here.
_IGNORED = frozenset({"metadata", "service_tier", "cache_control", "diagnostics", "inference_geo", "speed",
                      "user_profile_id", "workspace_id", "context_management", "betas"})  # fmt: skip
_REFUSED = frozenset({"container", "output_config", "mcp_servers"})


def read_messages(call: Call) -> ChatRequest:
    """Checks a body of /v1/messages. Raises ApiError."""
    limit = parameters.read_count(call.body, "max_tokens")
    if limit is None:
        raise invalid("max_tokens", "max_tokens: a positive integer is needed")
    return _read(call, limit)


def read_count_request(call: Call) -> ChatRequest:
    """Checks a body of /v1/messages/count_tokens. Raises ApiError."""
    return _read(call, 1)


def _read(call: Call, max_tokens: int) -> ChatRequest:
    body = call.body
    for name in body:
        if name in _REFUSED and body[name] is not None:
            raise invalid(name, f"{name}: this engine does not support it; leave it out", "unsupported_parameter")
        if name not in _OWN | _SAMPLING | _IGNORED | _REFUSED:
            raise invalid(name[:64], f"unknown parameter {name[:64]!r}", "unknown_parameter")
    if body.get("thread") is not None:  # Anthropic's tool runner asks for one, and by this code learns to do without
        message = "thread: conversations are not kept here; send all of their messages"
        raise invalid("thread", message, "thread_unsupported_request")
    params: dict[str, Any] = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    params["max_tokens"] = max_tokens
    if stop := parameters.read(body, "stop_sequences", list, []):
        params["stop"] = stop
    if thinking := parameters.read(body, "thinking", dict, {}):
        # `budget_tokens`, which goes with "enabled", is a bound that the service itself does not keep strictly.
        if thinking.get("type") not in ("enabled", "adaptive", "disabled"):
            raise invalid("thinking", "thinking.type must be enabled, adaptive or disabled")
        parameters.read_count(thinking, "budget_tokens")
        params["chat_template_kwargs"] = {"enable_thinking": thinking["type"] != "disabled"}
    choice = parameters.read(body, "tool_choice", dict, {})
    if choice.get("type", "auto") not in ("auto", "none", "any", "tool"):
        raise invalid("tool_choice", "tool_choice.type must be auto, none, any or tool")
    tools = [] if choice.get("type") == "none" else _tools(parameters.read(body, "tools", list, []))
    params.update(tool_params(tools, params))
    parallel_calls = not choice.get("disable_parallel_tool_use", False)
    if choice.get("type") in ("any", "tool"):
        if not tools:
            raise invalid("tool_choice", "tool_choice: there are no tools to choose from")
        required = tools if choice["type"] == "any" else structure.named_tool(choice.get("name"), tools)
        structure.add_form(params, structure.call_form(required, parallel_calls), "tool_choice")
    ask = Ask(
        model=parameters.read_model(body),
        prompt=_conversation(body),
        params=params,
        request_id=call.request_id,
        priority=call.caller.priority(None),
        stream=parameters.read(body, "stream", bool, False),
    )
    names = tuple(tool["function"]["name"] for tool in tools)
    return ChatRequest(ask, False, names, parallel_calls)


def _tools(tools: list[Any]) -> list[dict[str, Any]]:
    result = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or not isinstance(tool.get("name"), str) or not tool["name"]:
            raise invalid(f"tools[{index}]", f"tools[{index}] must be an object with a name")
        if tool.get("type") not in (None, "custom"):
            raise invalid(f"tools[{index}].type", f"tools[{index}]: only tools of the client's own are supported")
        function = {"name": tool["name"], "parameters": tool.get("input_schema", {"type": "object", "properties": {}})}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        result.append({"type": "function", "function": function})
    return result


def _conversation(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as chat templates know them."""
    given = parameters.read(body, "messages", list, [])
    if not given:
        raise invalid("messages", "messages must be a list of at least one message")
    system = "\n".join(_text(block, "system") for block in _blocks(body.get("system"), "system"))
    messages = [{"role": "system", "content": system}] if system else []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant", "system"):
            raise invalid(where, f"{where} must be an object with the role user or assistant")
        blocks = _blocks(message.get("content"), f"{where}.content")
        messages += (
            _assistant(blocks, where) if message["role"] == "assistant" else _user(blocks, message["role"], where)
        )
    return messages


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if content is None and where == "system":
        return []
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise invalid(where, f"{where} must be a string or a list of blocks")
    return content


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        raise invalid(where, f"{where}: a block of type {str(block.get('type'))[:60]!r} is not supported, only text is")
    return str(block["text"])


def _user(blocks: list[dict[str, Any]], role: str, where: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, before the user's text."""
    results, texts = [], []
    for block in blocks:
        if block.get("type") == "tool_result":
            content = [_text(part, where) for part in _blocks(block.get("content") or "", f"{where}.content")]
            results.append({"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": "\n".join(content)})
        else:
            texts.append(_text(block, where))
    if texts or not results:
        results.append({"role": role, "content": "\n".join(texts)})
    return results


def _assistant(blocks: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    texts, calls, thoughts = [], [], []
    for block in blocks:
        kind = block.get("type")
        if kind == "tool_use":
            function = {"name": block.get("name"), "arguments": json.dumps(block.get("input", {}), ensure_ascii=False)}
            calls.append({"id": block.get("id"), "type": "function", "function": function})
        elif kind == "thinking":
            thoughts.append(str(block.get("thinking", "")))
        elif kind != "redacted_thinking":
            texts.append(_text(block, where))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [message]


async def count_tokens(call: Call, chat: ChatRequest) -> int:
    """The prompt's tokens, of a request that was admitted. Raises ApiError."""
    template = {**template_of(chat.ask), **({"tools": chat.ask.params["tools"]} if chat.tools else {})}
    model = chat.ask.model
    return len(await call.tokenized(call.gateway.pool.tokenize(model, chat.ask.prompt, template), model))


async def complete_messages(call: Call, chat: ChatRequest) -> dict[str, Any]:
    """A whole answer. Raises ApiError."""
    async with call.admitted(chat.ask.model, [chat.ask]):
        reader = await make_reader(call, chat)
        result = await call.whole(chat.ask)
    message = read_message([*reader.feed(result.text), *reader.end()], chat.parallel_calls)
    content: list[dict[str, Any]] = []
    if message.reasoning:
        content.append({"type": "thinking", "thinking": message.reasoning, "signature": ""})
    if message.text or not message.calls:
        content.append({"type": "text", "text": message.text})
    for name, arguments in message.calls:
        content.append({"type": "tool_use", "id": _call_id(), "name": name, "input": _parsed(arguments)})
    return {
        **_head(call, chat, result.prompt_tokens),
        "content": content,
        "stop_reason": _stop_reason(result.finish_reason, bool(message.calls)),
        "usage": _usage(result),
    }


async def stream_messages(call: Call, chat: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer. Raises ApiError."""
    writer, answer = _BlockWriter(chat.parallel_calls), Answer()
    async with call.admitted(chat.ask.model, [chat.ask]):
        # Clients show how full the context is from the first event, which is sent before the engine counts.
        start = event("message_start", message=_head(call, chat, await count_tokens(call, chat)))
        reader = await make_reader(call, chat)
        async with contextlib.aclosing(call.pieces(chat.ask, answer)) as pieces:
            async for delta in pieces:
                events = reader.feed(delta.text)
                if delta.finish_reason is not None:
                    events += reader.end()
                if written := start + writer.write(events):
                    yield written
                start = b""
    assert answer.result is not None  # or `pieces` had raised
    reason = _stop_reason(answer.result.finish_reason, writer.has_called)
    end = event("message_delta", delta={"stop_reason": reason, "stop_sequence": None}, usage=_usage(answer.result))
    yield writer.end() + end + event("message_stop")


class _BlockWriter:
    """Events as content blocks, one open at a time."""

    def __init__(self, parallel_calls: bool) -> None:
        self._parallel = parallel_calls
        self._index = -1
        self._open: type[Event] | None = None
        self._calls = 0

    @property
    def has_called(self) -> bool:
        return self._calls > 0

    def write(self, events: Iterable[Event]) -> bytes:
        return b"".join(map(self._write, events))

    def end(self) -> bytes:
        """Ends the last block. An empty answer has one, too."""
        before = self._begin(Text, {"type": "text", "text": ""}) if self._index < 0 else b""
        return before + self.close()

    def close(self) -> bytes:
        """Ends the block that is open."""
        if self._open is None:
            return b""
        self._open = None
        return event("content_block_stop", index=self._index)

    def _write(self, item: Event) -> bytes:
        if isinstance(item, CallStart):
            self._calls += 1
        if isinstance(item, CallStart | CallArguments) and self._calls > 1 and not self._parallel:
            return b""
        if isinstance(item, Text):
            return self._begin(Text, {"type": "text", "text": ""}) + self._delta(type="text_delta", text=item.text)
        if isinstance(item, Reasoning):
            block = {"type": "thinking", "thinking": "", "signature": ""}
            return self._begin(Reasoning, block) + self._delta(type="thinking_delta", thinking=item.text)
        if isinstance(item, CallStart):
            call: dict[str, Any] = {"type": "tool_use", "id": _call_id(), "name": item.name, "input": {}}
            return self.close() + self._begin(CallStart, call)
        return self._delta(type="input_json_delta", partial_json=item.text)

    def _begin(self, kind: type[Event], block: Mapping[str, Any]) -> bytes:
        if self._open is kind:
            return b""
        before = self.close()
        self._open = kind
        self._index += 1
        return before + event("content_block_start", index=self._index, content_block=block)

    def _delta(self, **delta: Any) -> bytes:
        return event("content_block_delta", index=self._index, delta=delta)


def event(kind: str, **fields: Any) -> bytes:
    """One event; clients drop those without a name."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


def _head(call: Call, chat: ChatRequest, input_tokens: int) -> dict[str, Any]:
    return {
        "id": f"msg_{call.request_id}",
        "type": "message",
        "role": "assistant",
        "model": chat.ask.model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": input_tokens, "output_tokens": 0},
    }


def _usage(result: GenerateResult) -> dict[str, int]:
    return {"input_tokens": result.prompt_tokens, "output_tokens": result.completion_tokens}


def _stop_reason(reason: str | None, has_called: bool) -> str:
    """The engine does not tell a stop string from the model's own end, so `stop_sequence` is never said."""
    if reason == "length":
        return "max_tokens"
    return "tool_use" if has_called else "end_turn"


def _call_id() -> str:
    return f"toolu_{new_call_id()}"


def _parsed(arguments: str) -> Any:
    """Arguments as an object; those that were cut off are none."""
    with contextlib.suppress(orjson.JSONDecodeError):
        if isinstance(value := orjson.loads(arguments), dict) and not is_nested_deeply(value):
            return value
    return {}
