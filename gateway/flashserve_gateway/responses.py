"""OpenAI's Responses API, the part that agents need: text, function calls, events, and answers that are remembered."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from flashserve_client import GenerateResult

from . import parameters, structure
from .chat import ChatRequest, make_reader, tool_params
from .errors import ApiError, invalid
from .gateway import Call
from .pool import Answer, Ask
from .response_items import Fields, ItemWriter
from .store.interface import Shelf, StoreAway

OWN = frozenset({"model", "input", "instructions", "previous_response_id", "tools", "stream", "store",
                 "max_output_tokens", "parallel_tool_calls", "metadata", "stream_options",
                 "text", "tool_choice"})  # fmt: skip
SAMPLING = frozenset({"temperature", "top_p"})
IGNORED = parameters.IGNORED | {"access_programs"}
# What this engine does not have, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
    # litellm and others always ask for encrypted reasoning; here it is in its item as it is, and nothing is encrypted.
    "include": ([], ["reasoning.encrypted_content"]),
    "truncation": ("disabled",),
    "top_logprobs": (0,),
    "background": (False,),
    "background_options": (),
    "context_management": (),
    "conversation": (),
    "image": (),
    "max_tool_calls": (),
    "moderation": (),
    "prompt": (),
}
_RETRY_AWAY_S = 1.0


@dataclass(frozen=True)
class Kept:
    """An answer that a later request may go on from."""

    messages: list[dict[str, Any]]
    response: Fields


class ResponseStore:
    """Answers of the last hour, as JSON: objects take up to 25 times as much."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def keep(self, owner: str, messages: list[dict[str, Any]], response: Fields) -> bool:
        """Remembers an answer of the key ``owner`` with the messages that led to it; False if that cannot be."""
        body = orjson.dumps({"messages": messages, "response": response})
        try:
            return await self._shelf.put(owner, response["id"], body)
        except StoreAway:
            return False

    async def find(self, owner: str, response_id: str) -> Kept:
        """Raises ApiError for one that is not there, or not the owner's, or if that cannot be known now."""
        try:
            (body,) = await self._shelf.get(owner, [response_id])
        except StoreAway:
            raise _away() from None
        if body is None:
            raise ApiError(404, f"no response {response_id[:100]!r}", param="previous_response_id", code="not_found")
        return Kept(**orjson.loads(body))

    async def forget(self, owner: str, response_id: str) -> None:
        """Raises ApiError, as `find` does."""
        await self.find(owner, response_id)
        try:
            await self._shelf.remove(owner, response_id)
        except StoreAway:
            raise _away() from None


def _away() -> ApiError:
    words = "the store of responses is away; send the conversation's items instead of previous_response_id"
    return ApiError(
        503, words, param="previous_response_id", code="response_store_unavailable", retry_after_s=_RETRY_AWAY_S
    )


@dataclass(frozen=True)
class ResponseRequest:
    """A checked request."""

    chat: ChatRequest
    conversation: list[dict[str, Any]]
    """The messages without the instructions, which belong to one answer only."""
    is_kept: bool


async def read_response_request(call: Call, store: ResponseStore) -> ResponseRequest:
    """Checks a body. Raises ApiError."""
    body = call.body
    for name, value in body.items():
        if name not in OWN | SAMPLING | IGNORED and name not in NEUTRAL:
            raise invalid(name[:64], f"unknown parameter {name[:64]!r}", "unknown_parameter")
        if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
            raise invalid(name, f"{name}: this engine does not support that value", "unsupported_parameter")
    messages = _messages(body.get("input"))
    if previous := parameters.read(body, "previous_response_id", str, ""):
        messages = [*(await store.find(call.caller.key.name, previous)).messages, *messages]
    instructions = parameters.read(body, "instructions", str, "")
    stream = parameters.read(body, "stream", bool, False)
    parameters.read_usage_wanted(body, stream)  # checks the options; the usage is always told
    tools = [] if body.get("tool_choice") == "none" else _tools(parameters.read(body, "tools", list, []))
    params: dict[str, Any] = {name: body[name] for name in SAMPLING if body.get(name) is not None}
    params["max_tokens"] = parameters.read_count(body, "max_output_tokens") or parameters.INT32_MAX
    params.update(tool_params(tools, params))
    parallel_calls = parameters.read(body, "parallel_tool_calls", bool, True)
    structure.add_form(params, structure.text_format(body), "text")
    required = structure.must_call(body.get("tool_choice"), tools)
    if required is not None:
        structure.add_form(params, structure.call_form(required, parallel_calls), "tool_choice")
    ask = Ask(
        model=parameters.read_model(body),
        prompt=[*([{"role": "system", "content": instructions}] if instructions else []), *messages],
        params=params,
        request_id=call.request_id,
        priority=call.caller.priority(None),
        stream=stream,
    )
    names = tuple(tool["function"]["name"] for tool in tools)
    chat = ChatRequest(ask, False, names, parallel_calls)
    return ResponseRequest(chat, messages, parameters.read(body, "store", bool, True))


def _messages(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, str) and value:
        return [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise invalid("input", "input must be a non-empty string or list of items")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise invalid(f"input[{index}]", f"input[{index}] must be an object")
        _add_message(messages, item, f"input[{index}]")
    return messages


def _add_message(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Calls that follow each other are one message, as chat templates expect."""
    kind = item.get("type", "message")
    if kind == "message":
        role = "system" if item.get("role") == "developer" else item.get("role")
        messages.append({"role": role, "content": _text(item.get("content"), f"{where}.content")})
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        messages[-1] = {**messages[-1], "tool_calls": [*messages[-1].get("tool_calls", []), call]}
    elif kind == "function_call_output":
        content = _text(item.get("output"), f"{where}.output")
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    elif kind != "reasoning":  # what was thought earlier is not shown again
        raise invalid(where, f"{where}: items of type {str(kind)[:60]!r} are not supported")


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(where, f"{where} must be a string or a list of parts")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise invalid(where, f"{where}: a part of type {str(kind)[:60]!r} is not supported, only text is")
        texts.append(part["text"])
    return "\n".join(texts)


def _tools(tools: list[Any]) -> list[dict[str, Any]]:
    result = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, dict) or tool.get("type") != "function":
            raise invalid(f"tools[{index}]", f"tools[{index}]: only functions of the client's own are supported")
        if not isinstance(tool.get("name"), str) or not tool["name"]:
            raise invalid(f"tools[{index}].name", f"tools[{index}].name must be a non-empty string")
        function = {name: tool[name] for name in ("name", "description", "parameters") if tool.get(name) is not None}
        result.append({"type": "function", "function": function})
    return result


async def complete_response(call: Call, request: ResponseRequest, store: ResponseStore) -> Fields:
    """A whole answer. Raises ApiError."""
    writer = ItemWriter(call.request_id, request.chat.parallel_calls)
    async with call.admitted(request.chat.ask.model, [request.chat.ask]):
        reader = await make_reader(call, request.chat)
        result = await call.whole(request.chat.ask)
    writer.write([*reader.feed(result.text), *reader.end()])
    return (await _finish(call, request, writer, result, store))[1]


async def stream_response(call: Call, request: ResponseRequest, store: ResponseStore) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer. Raises ApiError."""
    writer, numbered, answer = ItemWriter(call.request_id, request.chat.parallel_calls), _Numbered(), Answer()
    begun = _response(call, request, "in_progress", [])
    start = [{"type": f"response.{name}", "response": begun} for name in ("created", "in_progress")]
    async with call.admitted(request.chat.ask.model, [request.chat.ask]):
        reader = await make_reader(call, request.chat)
        async with contextlib.aclosing(call.pieces(request.chat.ask, answer)) as pieces:
            async for delta in pieces:
                events = reader.feed(delta.text)
                if delta.finish_reason is not None:
                    events += reader.end()
                if written := numbered.encode([*start, *writer.write(events)]):
                    yield written
                start = []
    assert answer.result is not None  # or `pieces` had raised
    closing, response = await _finish(call, request, writer, answer.result, store)
    yield numbered.encode([*closing, {"type": f"response.{response['status']}", "response": response}])


class _Numbered:
    """Events with their numbers, which count from 0 without a gap."""

    def __init__(self) -> None:
        self._next = 0

    def encode(self, events: list[Fields]) -> bytes:
        lines = []
        for event in events:
            body = orjson.dumps({**event, "sequence_number": self._next})
            lines.append(b"event: " + event["type"].encode() + b"\ndata: " + body + b"\n\n")
            self._next += 1
        return b"".join(lines)


async def _finish(
    call: Call, request: ResponseRequest, writer: ItemWriter, result: GenerateResult, store: ResponseStore
) -> tuple[list[Fields], Fields]:
    """The last item's end, and the whole response, which is kept."""
    is_cut_off = result.finish_reason == "length"
    closing = writer.close("incomplete" if is_cut_off else "completed")
    response = _response(call, request, "incomplete" if is_cut_off else "completed", writer.items)
    if is_cut_off:
        response["incomplete_details"] = {"reason": "max_output_tokens"}
    response["usage"] = {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.timings.cached_tokens or 0, "cache_write_tokens": 0},
        "output_tokens": result.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
    if request.is_kept:
        messages = list(request.conversation)
        for item in writer.items:
            _add_message(messages, item, "output")
        response["store"] = await store.keep(call.caller.key.name, messages, response)
    return closing, response


def _response(call: Call, request: ResponseRequest, status: str, output: list[Fields]) -> Fields:
    body = call.body
    return {
        "id": f"resp_{call.request_id}",
        "object": "response",
        "created_at": call.created,
        "status": status,
        "model": request.chat.ask.model,
        "output": output,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": request.chat.parallel_calls,
        "previous_response_id": body.get("previous_response_id"),
        "store": request.is_kept,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
        "usage": None,
    }
