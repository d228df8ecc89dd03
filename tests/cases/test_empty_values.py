"""An empty list or a null asks for nothing: it is as good as leaving the key out."""

import pytest

from flashserve.errors import InvalidArgument
from flashserve.text.chat_template import ChatRequest, ChatTemplate

USER = {"role": "user", "content": "hi"}
SAYS_TOOLS = "{% if tools is not none %}You have {{ tools | length }} tools. {% endif %}{{ messages[-1].content }}"
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one tool call at once') }}{% endif %}CALL{% endif %}{{ m.content }}{% endfor %}"
)


def rendered(template, **request):
    return ChatTemplate(template, {}).render(ChatRequest.from_mapping({"messages": [USER], **request}))


@pytest.mark.parametrize("tools", [[], None])
def test_no_tools_are_none(tools):
    assert rendered(SAYS_TOOLS, tools=tools) == rendered(SAYS_TOOLS) == "hi"


def test_no_tool_calls_are_none():
    answer = {"role": "assistant", "content": "x", "tool_calls": []}
    assert rendered(ONE_CALL, messages=[USER, answer, USER]) == "hixhi"


def test_an_answer_of_nothing_stays_an_answer():
    answer = {"role": "assistant", "content": None, "tool_calls": []}
    assert rendered(ONE_CALL, messages=[USER, answer, USER]) == "hihi"
    with pytest.raises(InvalidArgument, match=r"messages\[1\]\.content"):
        rendered(ONE_CALL, messages=[USER, {"role": "assistant"}])


@pytest.mark.parametrize("key", ["chat_template_kwargs", "add_generation_prompt", "continue_final_message"])
def test_null_is_the_default(key):
    assert rendered(SAYS_TOOLS, **{key: None}) == "hi"
