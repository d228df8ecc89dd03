"""What a request gets that names no max_tokens: the model's own default, else vLLM's 16 for a text, all for a chat."""

import json

import pytest

from flashserve.errors import ConfigError
from flashserve.frontend.request_parser import ParserContext
from flashserve.text.chat_template import ChatTemplate
from flashserve.text.generation_defaults import read_generation_defaults
from parsed_requests import LIMITS, TOKENIZER, parsed

PROMPTS = {
    "text_input": "abc",
    "chat_request": json.dumps({"messages": [{"role": "user", "content": "abc"}]}),
}
PROMPT_TOKENS = len(TOKENIZER.encode("abc"))


def max_tokens(prompt, own=None, overrides=None, **parameters):
    """The parsed request's, by a model whose generation_config.json holds ``own``."""
    template = ChatTemplate("{{ messages[0].content }}", {})
    context = ParserContext(TOKENIZER, template, LIMITS, read_generation_defaults(own or {}, overrides))
    return parsed(context, parameters=parameters, **{prompt: PROMPTS[prompt]}).message.params.max_tokens


def test_a_text_gets_16_and_a_chat_the_context():
    assert max_tokens("text_input") == 16
    assert max_tokens("chat_request") == LIMITS.max_model_len - PROMPT_TOKENS


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_models_own_default_comes_first(prompt):
    assert max_tokens(prompt, {"max_new_tokens": 9}) == 9
    assert max_tokens(prompt, {"max_new_tokens": 9, "max_length": 30}) == 9
    assert max_tokens(prompt, {"max_new_tokens": 9}, overrides={"max_new_tokens": 11}) == 11


def test_a_text_may_fill_the_models_max_length():
    assert max_tokens("text_input", {"max_length": 30}) == 30 - PROMPT_TOKENS
    assert max_tokens("text_input", {"max_length": 4096}) == LIMITS.max_model_len - PROMPT_TOKENS
    assert max_tokens("text_input", {"max_length": 1}) == 16, "no room: the file means something else"
    assert max_tokens("chat_request", {"max_length": 30}) == LIMITS.max_model_len - PROMPT_TOKENS


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_request_comes_before_all(prompt):
    assert max_tokens(prompt, {"max_new_tokens": 9, "max_length": 30}, max_tokens=50) == 50


def test_min_tokens_raise_the_default():
    assert max_tokens("text_input", min_tokens=40) == 40


def test_null_means_nothing_and_nonsense_is_refused():
    assert max_tokens("text_input", {"max_length": None, "max_new_tokens": None}) == 16
    for value in (0, "30", True, 1.5):
        with pytest.raises(ConfigError, match="max_length must be a positive integer"):
            max_tokens("text_input", {"max_length": value})


def test_model_json_comes_before_the_file_and_also_without_it():
    own = {"temperature": 0.6, "top_k": 20}
    overrides = {"temperature": 0.1, "max_new_tokens": 5}
    both = {"temperature": 0.1, "top_k": 20, "max_tokens": 5}
    assert read_generation_defaults(own, overrides).parameters == both
    assert read_generation_defaults({}, overrides).parameters == {"temperature": 0.1, "max_tokens": 5}


@pytest.mark.parametrize("override", [{"length_penalty": 1.2}, {"temprature": 0.5}, {"eos_token_id": 5}])
def test_an_override_that_is_not_honoured_is_refused(override):
    """Unlike what the model's own file says, which somebody else wrote."""
    with pytest.raises(ConfigError, match=f"override_generation_config: {next(iter(override))}="):
        read_generation_defaults({}, override)
    assert read_generation_defaults({}, {"temprature": None}).parameters == {}


def test_repetition_penalty_is_a_default_as_in_vllm():
    assert read_generation_defaults({"repetition_penalty": 1.1}).parameters == {"repetition_penalty": 1.1}
    assert read_generation_defaults({}, {"repetition_penalty": 1.2}).parameters == {"repetition_penalty": 1.2}
