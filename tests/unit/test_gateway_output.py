"""Text, reasoning and tool calls in what models write, however it is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve_gateway.chat import Message, read_message
from flashserve_gateway.output.events import CallArguments, PlainReader, Reader
from flashserve_gateway.output.reasoning import ReasoningReader
from flashserve_gateway.output.tools import ToolReader
from gateway_peers import MemoryTransport, gate, says

TOOLS = ("f", "g", "get_weather")
NESTED = '{"a": {"b": [1, "}] \\" {", {"c": null}]}, "code": "if (x) { return \\"</tool_call>\\"; }"}'


def read(pieces: Iterable[str], reader: Reader | None = None) -> Message:
    reader = reader or ToolReader(TOOLS)
    events = [event for piece in pieces for event in reader.feed(piece)]
    return read_message([*events, *reader.end()])


# Text, then what is text in it, and its calls.
CASES: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "plain": ("Hello, <world> [1] {x}.", "Hello, <world> [1] {x}.", []),
    "space": ("  \n Hello \n", "  \n Hello \n", []),
    "hermes": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}')]),
    "hermes twice, after text": (
        'Let me see.\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n<tool_call>\n{"name": "g", '
        '"arguments": {}}\n</tool_call>',
        "Let me see.",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "hermes, prose behind": ('<tool_call>{"name": "f", "arguments": {}}</tool_call> Done.', " Done.", [("f", "{}")]),
    "hermes, arguments first": ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
    "hermes, no arguments": ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    "hermes, null": ('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [("f", "{}")]),
    "hermes, a string": ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("f", '{"a": 1}')]),
    "hermes, behind a bracket": (
        '[<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>',
        "[",
        [("f", '{"a": 1}')],
    ),
    "hermes, behind a bracket and a word": (
        '[a<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>]',
        "[a]",
        [("f", '{"a": 1}')],
    ),
    "mistral, behind a bracket": ('[a[TOOL_CALLS]f{"a": 1}', "[a", [("f", '{"a": 1}')]),
    "hermes, nested": (f'<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>', "", [("f", NESTED)]),
    "hermes, no end tag": ('<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "hermes, other keys": (
        '<tool_call>{"id": 7, "x": [1, {"name": "g"}], "name": "f", "arguments": {}, "y": "}"}</tool_call>',
        "",
        [("f", "{}")],
    ),
    "hermes, no call": ("<tool_call>nothing</tool_call>", "<tool_call>nothing</tool_call>", []),
    "hermes, no name": ('a <tool_call>{"arguments": {}}</tool_call>', 'a <tool_call>{"arguments": {}}</tool_call>', []),
    "hermes, cut off": ('<tool_call>{"name": "f", "arguments": {"a": "b', "", [("f", '{"a": "b')]),
    "hermes, cut off early": ('Well <tool_call>{"name": "f', 'Well <tool_call>{"name": "f', []),
    "hermes, only its tag": ("Well <tool_ca", "Well <tool_ca", []),
    "hermes, a tool nobody gave": ('<tool_call>{"name": "x", "arguments": {}}</tool_call>', "", [("x", "{}")]),
    "llama": ('{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "llama, marked": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "llama, semicolon": (
        '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "llama, newline": (
        '\n{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}\n',
        "",
        [("f", "{}"), ("g", "{}")],
    ),
    "llama, with a type": ('{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "llama, prose behind": ('{"name": "f", "parameters": {}} Done.', "Done.", [("f", "{}")]),
    "an answer in JSON": ('{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', []),
    "an answer in JSON with a list": (' {"x": [{"name": "f"}]} ', ' {"x": [{"name": "f"}]} ', []),
    "JSON behind text": ('It is {"name": "f", "parameters": {}}', 'It is {"name": "f", "parameters": {}}', []),
    "mistral": (
        '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1.50}}, {"name": "g", "arguments": {}}]',
        "",
        [("f", '{"a": 1.50}'), ("g", "{}")],
    ),
    "mistral, its mark lost": ('[{"name": "f", "arguments": {"a": 1}}]', "", [("f", '{"a": 1}')]),
    "mistral 11": (
        '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}',
        "",
        [("f", '{"a": 1}'), ("g", "{}")],
    ),
    "mistral, text before": ('Sure. [TOOL_CALLS]f{"a": 1}', "Sure.", [("f", '{"a": 1}')]),
    "mistral, no call": ("[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    "a list in JSON": ('[{"name": "Bob"}, 2]', '[{"name": "Bob"}, 2]', []),
    "pythonic": (
        '[f(a=1, b="x, y)", c=[1, {"k": None}], d=True, e=-2.5), g()]',
        "",
        [("f", '{"a": 1, "b": "x, y)", "c": [1, {"k": null}], "d": true, "e": -2.5}'), ("g", "{}")],
    ),
    "pythonic, no literal": ("[f(a=today)]", "", [("f", '{"a": "today"}')]),
    "pythonic, positional": ("[f(1, b=2)]", "", [("f", '{"b": 2}')]),
    "pythonic, quotes": ("[f(a='it\\'s \"so\"')]", "", [("f", '{"a": "it\'s \\"so\\""}')]),
    "pythonic, no tool": ("[print(1), f(a=1)]", "[print(1), f(a=1)]", []),
    "a list": ("[1, 2, 3] and more", "[1, 2, 3] and more", []),
    "an empty list": ("[]", "[]", []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_text_and_what_are_calls(name: str):
    text, content, calls = CASES[name]
    message = read([text])
    assert (message.text, message.calls) == (content, calls)
    if "cut off" not in name:
        assert all(isinstance(json.loads(arguments), dict) for _, arguments in message.calls)


@pytest.mark.parametrize("name", CASES)
def test_character_by_character_it_is_the_same(name: str):
    text, content, calls = CASES[name]
    message = read(text)
    assert (message.text, message.calls) == (content, calls)


FRAGMENTS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", '{"name": "f", ',
             '"arguments": ', '{"a": 1}', "}", "{", "[", "]", "f(", "a=", ")", ",", ";", " ", "\n", '"', "\\", "text",
             "f", "<", "1", "<think>", "</think>", "é😀"]  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from([text for text, _, _ in CASES.values()]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    st.tuples(st.sampled_from([text for text, _, _ in CASES.values()]), st.text(max_size=20)).map("".join),
)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 400), max_size=12), reasoning=st.booleans())
def test_any_split_gives_the_same_as_the_whole(text: str, cuts: list[int], reasoning: bool):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in pairwise(edges)]
    for make in (
        lambda: ToolReader(TOOLS),
        lambda: ReasoningReader(ToolReader(TOOLS), reasoning),
        lambda: ReasoningReader(PlainReader(), reasoning),
    ):
        whole, split = read([text], make()), read(pieces, make())
        assert (split.text, split.reasoning, split.calls) == (whole.text, whole.reasoning, whole.calls)
        assert read(text, make()) == whole


@given(text=st.text(max_size=60))
def test_no_text_is_lost_where_there_is_no_call(text: str):
    assert read([text], ReasoningReader(PlainReader())).text == text or text.lstrip().startswith("<think>")
    message = read([text])
    assert message.calls or message.text == text


def test_an_answer_in_json_is_not_held_back():
    reader = ToolReader(TOOLS)
    text = '{"answer": "' + "word " * 20
    assert read_message(reader.feed(text)).text == text.rstrip()


def test_arguments_come_in_pieces():
    """Not at the end as a whole: a client shows a long file as it is written."""
    for before, after in (
        ('<tool_call>{"name": "f", "arguments": ', "}</tool_call>"),
        ('{"name": "f", "parameters": ', "}"),
        ("[TOOL_CALLS]f[ARGS]", ""),
    ):
        reader = ToolReader(TOOLS)
        reader.feed(before)
        arguments = '{"text": "' + "word " * 20 + '"}'
        streamed = ""
        for number, character in enumerate(arguments, 1):
            streamed += "".join(event.text for event in reader.feed(character) if isinstance(event, CallArguments))
            assert streamed == arguments[:number]
        reader.feed(after)


# --- reasoning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "has_begun", "reasoning", "content"),
    [
        ("<think>\nhm\n</think>\n\nYes", False, "hm", "Yes"),
        ("hm, so\n</think>\n\nYes", True, "hm, so", "Yes"),
        ("<think></think>Yes", False, "", "Yes"),
        ("<think>a < b <em> c</think>Yes", False, "a < b <em> c", "Yes"),
        ("<think>never ends", False, "never ends", ""),
        ("  Yes <think>no</think>", False, "", "  Yes <think>no</think>"),
        ("<thin", False, "", "<thin"),
    ],
)
def test_reasoning_is_split_off(text: str, has_begun: bool, reasoning: str, content: str):
    message = read(text, ReasoningReader(PlainReader(), has_begun))
    assert (message.reasoning, message.text) == (reasoning, content)


def test_a_tool_is_called_after_reasoning_and_not_in_it():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    message = read(f"<think>maybe {call}</think>\n\n{call}", ReasoningReader(ToolReader(TOOLS)))
    assert message.reasoning == f"maybe {call}"
    assert (message.text, message.calls) == ("", [("f", "{}")])


# --- through the gateway -----------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}}
CALL = ['<tool_call>{"name": "get_', 'weather", "arguments": {"city": ', '"Rome"', "}}</tool_call>"]


async def test_a_streamed_call_has_its_id_and_name_once():
    async with gate(MemoryTransport(says("Well.", *CALL, *CALL))) as gateway:
        chunks = await gateway.chunks(tools=[TOOL])
        deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
        for index in (0, 1):
            first, *others = [delta for delta in deltas if delta["index"] == index]
            assert first["function"] == {"name": "get_weather", "arguments": ""}
            assert len(first["id"]) == 9 and first["id"].isalnum()
            assert all(
                set(delta) == {"index", "function"} and set(delta["function"]) == {"arguments"} for delta in others
            )
            assert "".join(delta["function"]["arguments"] for delta in others) == '{"city": "Rome"}'
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
        assert gateway.engine.asked[0].chat["tools"] == [TOOL]
        # Mistral's mark of a call is a special token, which is left out of text otherwise.
        assert gateway.engine.asked[0].sampling["skip_special_tokens"] is False
        await gateway.chat()
        assert "skip_special_tokens" not in gateway.engine.asked[1].sampling


async def test_a_whole_call_and_its_content():
    async with gate(MemoryTransport(says(*CALL))) as gateway:
        choice = (await gateway.chat(tools=[TOOL])).json()["choices"][0]
        assert choice["message"]["content"] is None
        assert choice["message"]["tool_calls"][0]["function"] == {
            "name": "get_weather",
            "arguments": '{"city": "Rome"}',
        }
        assert choice["finish_reason"] == "tool_calls"


async def test_tools_that_may_not_be_called_are_neither_shown_nor_read():
    async with gate(MemoryTransport(says(*CALL))) as gateway:
        choice = (await gateway.chat(tools=[TOOL], tool_choice="none")).json()["choices"][0]
        assert choice["message"]["content"] == "".join(CALL)
        assert "tools" not in gateway.engine.asked[0].chat


async def test_one_call_at_most_if_there_may_be_no_more():
    async with gate(MemoryTransport(says(*CALL, *CALL))) as gateway:
        body = {"tools": [TOOL], "parallel_tool_calls": False}
        assert len((await gateway.chat(**body)).json()["choices"][0]["message"]["tool_calls"]) == 1
        deltas = [chunk["choices"][0]["delta"] for chunk in await gateway.chunks(**body)]
        assert {call["index"] for delta in deltas for call in delta.get("tool_calls", [])} == {0}


async def test_a_call_that_was_cut_off_says_length():
    async with gate(MemoryTransport(says(*CALL[:2], finish="length"))) as gateway:
        assert (await gateway.chat(tools=[TOOL])).json()["choices"][0]["finish_reason"] == "length"


async def test_reasoning_has_both_names_and_is_known_by_the_prompt():
    async with gate(
        MemoryTransport(says("hm\n", "</think>\n\nYes"), template="<|user|>%s<|assistant|><think>\n")
    ) as gateway:
        message = (await gateway.chat()).json()["choices"][0]["message"]
        assert (message["reasoning"], message["reasoning_content"], message["content"]) == ("hm", "hm", "Yes")
        deltas = [chunk["choices"][0]["delta"] for chunk in await gateway.chunks()]
        assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes"
