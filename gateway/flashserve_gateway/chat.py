"""Chat requests: what they ask of the engine, and its answer in OpenAI's forms."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from openai.types.chat import ChatCompletion

from . import parameters, structure
from .abilities import refuse_missing
from .errors import invalid
from .gateway import Call, usage_of
from .logprobs import chat_logprobs, read_chat_count
from .merging import gathered, merged
from .output.events import CallArguments, CallStart, Event, PlainReader, Reader, Reasoning, Text
from .output.reasoning import OPENING, ReasoningReader
from .output.tools import ToolReader
from .pool import Answer, Ask
from .sse import DONE, ChatChunks

_MAX_TOOLS = 1024
_TEMPLATE_FIELDS = ("chat_template_kwargs", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True)
class ChatRequest:
    """A checked request."""

    ask: Ask
    usage_wanted: bool
    tools: tuple[str, ...] = ()
    """Names of the tools that may be called."""
    parallel_calls: bool = True
    samples: int = 1
    logprobs: int | None = None
    """Alternatives of each token; None: no log-probabilities."""
    is_named: bool = False
    """One tool must be called: then OpenAI ends with the reason of an answer without calls."""


def read_chat(call: Call) -> ChatRequest:
    """Checks a body. Raises ApiError for what the gateway knows to be wrong; the engine checks the rest."""
    body = call.body
    parameters.check_names(body, parameters.CHAT)
    refuse_missing(body)
    stream = parameters.read(body, "stream", bool, False)
    limits = [parameters.read_count(body, name) for name in ("max_completion_tokens", "max_tokens")]
    params = parameters.engine_params(body)
    params["max_tokens"] = limits[0] or limits[1] or parameters.INT32_MAX
    params.update({name: body[name] for name in _TEMPLATE_FIELDS if body.get(name) is not None})
    params.update(parameters.read_progress_wanted(body, stream))
    structure.add_form(params, structure.response_format(body), "response_format")
    tools = _tools(body)
    params.update(tool_params(tools, params))
    logprobs = read_chat_count(body)
    if logprobs is not None:
        params["logprobs"] = logprobs
    parallel_calls = parameters.read(body, "parallel_tool_calls", bool, True)
    required = structure.must_call(body.get("tool_choice"), tools)
    is_named = required is not None and body["tool_choice"] != "required"
    if required is not None:
        structure.add_form(params, structure.call_form(required, parallel_calls and not is_named), "tool_choice")
    ask = Ask(
        model=parameters.read_model(body),
        prompt=_messages(body),
        params=params,
        request_id=call.request_id,
        priority=call.caller.priority(parameters.read_priority(body)),
        stream=stream,
    )
    return ChatRequest(
        ask=ask,
        usage_wanted=parameters.read_usage_wanted(body, stream),
        tools=tuple(tool["function"]["name"] for tool in tools),
        parallel_calls=parallel_calls,
        is_named=is_named,
        samples=parameters.read_samples(body, call.gateway.settings.limits.samples),
        logprobs=logprobs,
    )


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages as templates know them: `developer` is OpenAI's new name of `system`, which no template has."""
    messages = parameters.read(body, "messages", list, [])
    if not messages:
        raise invalid("messages", "messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise invalid(f"messages[{index}]", f"messages[{index}] must be an object")
    return [{**message, "role": "system"} if message.get("role") == "developer" else message for message in messages]


def tool_params(tools: list[dict[str, Any]], params: Mapping[str, Any]) -> dict[str, Any]:
    """What tools add to a request. The marks of their calls are special tokens in some models, and must be seen."""
    return {"tools": tools, "skip_special_tokens": params.get("skip_special_tokens", False)} if tools else {}


def template_of(ask: Ask) -> dict[str, Any]:
    """What the chat template is given beside messages and tools."""
    return {name: ask.params[name] for name in _TEMPLATE_FIELDS if name in ask.params}


def _tools(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tools that may be called; none with `tool_choice: none`."""
    tools = parameters.read(body, "tools", list, [])
    if len(tools) > _MAX_TOOLS:
        raise invalid("tools", f"tools: at most {_MAX_TOOLS}, not {len(tools)}")
    for index, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or tool.get("type", "function") != "function":
            raise invalid(f"tools[{index}]", f"tools[{index}] must be an object of type function")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise invalid(f"tools[{index}].function.name", f"tools[{index}].function.name must be a non-empty string")
    if not tools and body.get("tool_choice") == "auto":
        raise invalid("tool_choice", "tool_choice: there are no tools to choose from")
    return [] if body.get("tool_choice") == "none" else tools


async def make_reader(call: Call, chat: ChatRequest) -> Reader:
    """How the answer is to be read. Raises ApiError."""
    answer = ToolReader(chat.tools) if chat.tools else PlainReader()
    template = template_of(chat.ask)
    has_begun = False
    # A form begins with the first token: whatever the prompt opened, the model does not reason.
    if not template.get("continue_final_message") and "structured_outputs" not in chat.ask.params:
        has_begun = await call.gateway.pool.prompt_ends_with(OPENING, chat.ask.model, template)
    return ReasoningReader(answer, has_begun)


async def stream_chat(call: Call, chat: ChatRequest) -> AsyncGenerator[bytes, None]:
    """The events of a streamed answer. Raises ApiError."""
    asks = chat.ask.samples(chat.samples)
    writers = [
        ChatChunks(_answer_id(call), chat.ask.model, call.created, chat.usage_wanted, index)
        for index in range(len(asks))
    ]
    answers = [Answer() for _ in asks]
    # The roles go with the first token, in one write; all of them, since clients number choices as they meet them.
    before = b"".join(chunks.role() for chunks in writers)
    async with call.admitted(chat.ask.model, asks):
        streams = [_stream_choice(call, chat, *parts) for parts in zip(asks, writers, answers, strict=True)]
        async with contextlib.aclosing(merged(streams)) as events:
            async for event in events:
                yield before + event
                before = b""
    end = b""
    if chat.usage_wanted:
        results = [answer.result for answer in answers if answer.result is not None]
        end = writers[0].usage(usage_of(results, chat.samples))
    yield end + DONE


async def _stream_choice(
    call: Call, chat: ChatRequest, ask: Ask, chunks: ChatChunks, answer: Answer
) -> AsyncGenerator[bytes, None]:
    reader, writer, reason = await make_reader(call, chat), _DeltaWriter(chunks, chat.parallel_calls), "stop"
    async with contextlib.aclosing(call.pieces(ask, answer)) as pieces:
        async for delta in pieces:
            if delta.progress is not None:
                yield chunks.progress(delta.progress._asdict())
            events = reader.feed(delta.text)
            if delta.finish_reason is not None:
                reason = delta.finish_reason
                events += reader.end()
            scored = b""
            if chat.logprobs is not None and delta.logprobs:
                last = events[-1] if events else None
                text = last.text if isinstance(last, Text) else ""
                events = events[:-1] if text else events
                scored = chunks.scored(text, chat_logprobs(delta.logprobs, chat.logprobs))
            if event := writer.write(events) + scored:
                yield event
    yield chunks.finish(finish_reason(reason, writer.has_called and not chat.is_named))


class _DeltaWriter:
    """Events as deltas. An id and a name come once per call: clients join what comes again."""

    def __init__(self, chunks: ChatChunks, parallel_calls: bool) -> None:
        self._chunks = chunks
        self._parallel = parallel_calls
        self._index = -1

    @property
    def has_called(self) -> bool:
        return self._index >= 0

    def write(self, events: Iterable[Event]) -> bytes:
        return b"".join(map(self._write, events))

    def _write(self, event: Event) -> bytes:
        if isinstance(event, Text):
            return self._chunks.content(event.text)
        if isinstance(event, Reasoning):
            return self._chunks.delta(reasoning_fields(event.text))
        if isinstance(event, CallStart):
            self._index += 1
        if self._index > 0 and not self._parallel:
            return b""
        if isinstance(event, CallStart):
            function = {"name": event.name, "arguments": ""}
            call: dict[str, Any] = {"index": self._index, "id": new_call_id(), "type": "function", "function": function}
        else:
            call = {"index": self._index, "function": {"arguments": event.text}}
        return self._chunks.delta({"tool_calls": [call]})


async def complete_chat(call: Call, chat: ChatRequest) -> ChatCompletion:
    """A whole answer. Raises ApiError."""
    asks = chat.ask.samples(chat.samples)
    async with call.admitted(chat.ask.model, asks):
        readers = [await make_reader(call, chat) for _ in asks]
        results = await gathered([call.whole(ask) for ask in asks])
    choices = []
    for index, (result, reader) in enumerate(zip(results, readers, strict=True)):
        message = read_message([*reader.feed(result.text), *reader.end()], chat.parallel_calls)
        reason = finish_reason(result.finish_reason or "stop", bool(message.calls) and not chat.is_named)
        logprobs = None if chat.logprobs is None else chat_logprobs(result.logprobs or (), chat.logprobs)
        choices.append({"index": index, "message": message.as_openai(), "finish_reason": reason, "logprobs": logprobs})
    return ChatCompletion.model_validate(
        {
            "id": _answer_id(call),
            "object": "chat.completion",
            "created": call.created,
            "model": chat.ask.model,
            "choices": choices,
            "usage": usage_of(results, chat.samples),
        }
    )


@dataclass
class Message:
    """A whole answer, taken apart."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    """Names and arguments."""

    def as_openai(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.text or (None if self.calls else "")}
        if self.reasoning:
            message.update(reasoning_fields(self.reasoning))
        if self.calls:
            message["tool_calls"] = [
                {"id": new_call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in self.calls
            ]
        return message


def read_message(events: Iterable[Event], parallel_calls: bool = True) -> Message:
    """The message that events make."""
    message = Message()
    for event in events:
        if isinstance(event, Text):
            message.text += event.text
        elif isinstance(event, Reasoning):
            message.reasoning += event.text
        elif isinstance(event, CallStart):
            message.calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            name, arguments = message.calls[-1]
            message.calls[-1] = (name, arguments + event.text)
    if not parallel_calls:
        del message.calls[1:]
    return message


def reasoning_fields(text: str) -> dict[str, str]:
    """Under both names in use: litellm and others read the older one, OpenRouter's clients the newer."""
    return {"reasoning": text, "reasoning_content": text}


def finish_reason(reason: str, has_called: bool) -> str:
    """OpenAI's word. An answer that was cut off says so, even in the middle of a call."""
    if reason == "length":
        return "length"
    return "tool_calls" if has_called else "stop"


def new_call_id() -> str:
    """Nine letters and digits: the templates of Mistral's models refuse any other id."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    return "".join(secrets.choice(alphabet) for _ in range(9))


def _answer_id(call: Call) -> str:
    return f"chatcmpl-{call.request_id}"
