"""Chat templates render as in transformers; what they cannot render is an InvalidArgument."""

import copy
import itertools
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from flashserve.errors import InvalidArgument
from flashserve.text.chat_template import ChatRequest, ChatTemplate
from small_tokenizers import byte_level

# Written after the templates that models are published with: their means, not their words.
CHATML = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages | length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n' }}
    {%- endif %}
    {%- if message.content %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>' + call.function.name + ' ' }}{{- call.function.arguments | tojson }}{{- '</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string }}
{{- "\\n\\n" + system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}
{% generation %}
{{ message['content'] + eos_token }}
{% endgeneration %}
{% else %}
{{ raise_exception('Only user and assistant roles are supported!') }}
{% endif %}
{% endfor %}
"""

PARTS = """{% for message in messages %}
<|{{ message.role }}|>{% if message.content is string %}{{ message.content }}{% else %}
{% for part in message['content'] %}[{{ part.type }}:{{ part.text }}]{% endfor %}
{% endif %}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "parts": PARTS}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "<b> & 'q' ü", "parameters": {"a": [1, 2.5]}}}]

USER = {"role": "user", "content": "  What is <1 & 2>?  "}
ANSWER = {"role": "assistant", "content": "It's 3. ü "}
CONVERSATIONS = {
    "one": [USER],
    "system": [{"role": "system", "content": "Be brief.\n"}, USER],
    "three": [USER, ANSWER, USER],
    "answered": [USER, ANSWER],
    "nulls": [{**USER, "name": None}, {**ANSWER, "tool_calls": None}],
    "thinking": [USER, {**ANSWER, "thinking": "hm"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}],
    "call": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "ü"}}}]},
        {"role": "tool", "content": "ok"},
    ],
}


def ours(template: Any, **request: Any) -> str:
    return ChatTemplate(template, SPECIAL).render(ChatRequest.from_mapping(request))


def theirs(template: str, messages: list[dict[str, Any]], **settings: Any) -> str:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), **SPECIAL, chat_template=template)
    kwargs = settings.pop("chat_template_kwargs", {})
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings, **kwargs)


SETTINGS: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"add_generation_prompt": False},
    {"add_generation_prompt": False, "continue_final_message": True},
    {"add_generation_prompt": True, "tools": TOOLS},
    {"add_generation_prompt": True, "chat_template_kwargs": {"enable_thinking": False, "date_string": "today"}},
]


# Templates that add strings get parts joined (below); transformers would print the list.
CASES = [case for case in itertools.product(TEMPLATES, CONVERSATIONS) if case[0] == "parts" or case[1] != "parts"]


@pytest.mark.parametrize(("template", "conversation"), CASES)
@pytest.mark.parametrize("settings", SETTINGS, ids=range(len(SETTINGS)))
def test_renders_as_transformers_does_and_refuses_what_it_refuses(template, conversation, settings):
    messages = copy.deepcopy(CONVERSATIONS[conversation])
    try:
        expected = theirs(TEMPLATES[template], messages, **copy.deepcopy(settings))
    except Exception:
        with pytest.raises(InvalidArgument):
            ours(TEMPLATES[template], messages=messages, **settings)
    else:
        assert ours(TEMPLATES[template], messages=messages, **settings) == expected


def test_raise_exception_reaches_the_client():
    with pytest.raises(
        InvalidArgument, match="the chat template refused the request: Conversation roles must alternate"
    ):
        ours(MISTRAL, messages=[USER, USER])


def test_parts_are_joined_for_templates_that_read_strings():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    prompt = ours(MISTRAL, messages=[{"role": "user", "content": parts}])
    assert prompt == "<s>[INST] one\ntwo [/INST]\n"


def test_arguments_of_tool_calls_may_come_as_json_text_like_in_openais_api():
    def conversation(arguments):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [USER, {"role": "assistant", "tool_calls": [call]}]

    assert ours(CHATML, messages=conversation('{"a": 1}')) == ours(CHATML, messages=conversation({"a": 1}))


def test_the_generation_prompt_is_on_unless_the_final_message_goes_on():
    assert ours(CHATML, messages=[USER]).endswith("<|im_start|>assistant\n")
    assert ours(CHATML, messages=[USER, ANSWER], continue_final_message=True).endswith("It's 3. ü ")


def test_the_template_for_tools_is_taken_when_there_are_tools():
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    assert ours(named, messages=[USER]) == "plain"
    assert ours(named, messages=[USER], tools=TOOLS) == "with tools"
    assert ours({"default": "plain"}, messages=[USER], tools=TOOLS) == "plain"


@pytest.mark.parametrize("template", [None, [], {"other": "x"}, 5, "{% if %}", {"default": None}])
def test_without_a_usable_template_the_model_is_served_and_chat_is_refused(template):
    with pytest.raises(InvalidArgument, match=r"chat template.*send text_input instead"):
        ours(template, messages=[USER])


HOSTILE = {
    "internals": "{{ ''.__class__.__mro__ }}",
    "mutation": "{{ messages.append(1) }}",
    "undefined": "{{ nothing.at.all }}",
    "arithmetic": "{{ 1 // 0 }}",
    "types": "{{ 'a' + 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "huge": "{% for i in range(10000000) %}x{% endfor %}",
    "surrogate": "{{ raise_exception(messages[0].content) }}",
}


@pytest.mark.parametrize("template", HOSTILE.values(), ids=HOSTILE.keys())
def test_whatever_a_template_does_is_an_invalid_argument(template):
    with pytest.raises(InvalidArgument, match="the chat template refused") as caught:
        ours(template, messages=[{"role": "user", "content": "\ud800"}])
    caught.value.wire_message().encode()


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "chat_request.messages must be a list of at least one message"),
        ({"messages": []}, "chat_request.messages must be a list of at least one message"),
        ({"messages": "hi"}, "chat_request.messages must be a list, not a string"),
        ({"messages": ["hi"]}, r"messages\[0\] must be an object, not a string"),
        ({"messages": [{"content": "hi"}]}, r"messages\[0\].role must be a non-empty string"),
        ({"messages": [{"role": 5, "content": "hi"}]}, r"messages\[0\].role must be a non-empty string"),
        ({"messages": [USER, {"role": "user"}]}, r"messages\[1\].content must be a string or a list of text parts"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content .* not a number"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, r"messages\[0\].content\[0\] must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, r"content\[0\].text must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "content.* is of type 'image_url'; only text is supported, images are not",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": 1}]}, "tool_calls must be a list of objects"),
        (
            {"messages": [{"role": "user", "tool_calls": [{"function": {"arguments": "{"}}]}]},
            r"tool_calls\[0\].function.arguments is not valid JSON",
        ),
        ({"messages": [USER], "tools": {}}, "chat_request.tools must be a list, not an object"),
        ({"messages": [USER], "tools": [1]}, r"chat_request.tools\[0\] must be an object"),
        ({"messages": [USER], "model": "x"}, "unknown key 'model' in chat_request; it takes messages, tools"),
        ({"messages": [USER], "add_generation_prompt": 1}, "add_generation_prompt must be a boolean, not a number"),
        ({"messages": [USER], "chat_template_kwargs": {"messages": []}}, "must not hold messages"),
        ({"messages": [USER], "chat_template_kwargs": []}, "chat_template_kwargs must be an object, not a list"),
        (
            {"messages": [USER], "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message exclude each other",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": []}], "continue_final_message": True},
            "continue_final_message needs a final message with text content",
        ),
    ],
)
def test_wrong_requests_are_refused_by_the_name_of_the_field(request_, words):
    with pytest.raises(InvalidArgument, match=words):
        ours(CHATML, **request_)


def test_a_template_that_drops_the_final_message_cannot_continue_it():
    with pytest.raises(InvalidArgument, match="leaves the final message out"):
        ours("always the same", messages=[USER], continue_final_message=True)
