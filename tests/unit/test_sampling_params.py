"""Request parameters: what is accepted in which forms, what is refused, and what the refusal says."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.errors import InvalidArgument
from flashserve.protocol import SamplingParams
from flashserve.sampling_params import (
    NEUTRAL,
    PARAMETERS,
    TABLE,
    RequestOptions,
    parse_parameters,
    parse_sampling_params,
)


def test_nothing_given_is_the_defaults():
    assert parse_sampling_params({}) == SamplingParams()


def test_every_parameter_reaches_its_field():
    values = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": -5, "max_tokens": 10, "min_tokens": 2,
        "stop": ["a", "b"], "stop_token_ids": [1, 2], "include_stop_str_in_output": True, "ignore_eos": True,
        "skip_special_tokens": False, "truncate_prompt_tokens": 7,
    }  # fmt: skip
    expected = SamplingParams(**{**values, "stop": ("a", "b"), "stop_token_ids": (1, 2)})
    assert parse_sampling_params(values) == expected
    as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}
    assert parse_sampling_params(as_text) == expected


def test_the_requests_own_parameters_are_split_off():
    values = {
        "max_tokens": 1, "prompt_token_ids": [1, 2], "priority": -3, "timeout_ms": 1500, "id": "abc", "cache_salt": "s",
    }  # fmt: skip
    parsed = parse_parameters(values)
    assert parsed.sampling == SamplingParams(max_tokens=1)
    assert parsed.options == RequestOptions(
        prompt_token_ids=[1, 2], priority=-3, timeout_s=1.5, request_id="abc", cache_salt="s"
    )
    with pytest.raises(InvalidArgument, match="priority belongs to the request"):
        parse_sampling_params({"priority": 1})


def test_tritons_timeout_is_in_microseconds_and_zero_is_none():
    assert parse_parameters({"timeout": 2_000_000}).options.timeout_s == 2.0
    assert parse_parameters({"timeout": 0}).options.timeout_s is None
    assert parse_parameters({"timeout": 2_000_000, "timeout_ms": 500}).options.timeout_s == 0.5


def test_a_number_as_id_is_its_text():
    assert parse_parameters({"id": 7}).options.request_id == "7"


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"max_tokens": "100"}, "max_tokens", 100),
        ({"max_tokens": 100.0}, "max_tokens", 100),
        ({"max_tokens": " 1e2 "}, "max_tokens", 100),
        ({"temperature": 1}, "temperature", 1.0),
        ({"temperature": ".5"}, "temperature", 0.5),
        ({"temperature": 1e-7}, "temperature", 0.0),  # as in vLLM: that is greedy
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": "-1"}, "top_k", 0),
        ({"ignore_eos": "True"}, "ignore_eos", True),
        ({"stop": "END"}, "stop", ("END",)),
        ({"stop": '["a", "b"]'}, "stop", ("a", "b")),
        ({"stop": "["}, "stop", ("[",)),
        ({"stop": "[]"}, "stop", ("[]",)),  # a list that could stop nothing; code, more likely
        ({"stop": "[1, 2]"}, "stop", ("[1, 2]",)),
        ({"stop": []}, "stop", ()),
        ({"stop": None}, "stop", ()),
        ({"stop_token_ids": "[1, 2]"}, "stop_token_ids", (1, 2)),
        ({"stop_token_ids": "[]"}, "stop_token_ids", ()),
        ({"seed": 2**63 - 1}, "seed", 2**63 - 1),
        ({"seed": str(-(2**63))}, "seed", -(2**63)),
        ({"seed": None}, "seed", None),
        ({"seed": -1}, "seed", None),
        ({"seed": "-1"}, "seed", None),
        ({"seed": -2}, "seed", -2),
        ({"seed": ""}, "seed", None),
        ({"stop": ""}, "stop", ()),
        ({"max_tokens": ""}, "max_tokens", None),
        ({"presence_penalty": "-2"}, "presence_penalty", -2.0),
        ({"repetition_penalty": 1}, "repetition_penalty", 1.0),
        ({"logit_bias": {"5": -100, 6: "0.5"}}, "logit_bias", {5: -100.0, 6: 0.5}),
        ({"logit_bias": '{"5": 1}'}, "logit_bias", {5: 1.0}),
        ({"bad_words": '["a", "b"]'}, "bad_words", ("a", "b")),
        ({"bad_words": "a"}, "bad_words", ("a",)),
        ({"dry_sequence_breakers": "[]"}, "dry_sequence_breakers", ()),
    ],
)
def test_values_are_coerced_to_the_parameters_type(given, field, value):
    result = getattr(parse_sampling_params(given), field)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"temperature": -0.1}, r"temperature must be a number in \[0, 1000\], not -0.1"),
        ({"temperature": float("nan")}, "temperature must be a number .*, not nan"),
        ({"temperature": "nan"}, "temperature must be a number .*, not 'nan'"),
        ({"temperature": "Infinity"}, "temperature must be a number"),
        ({"temperature": float("inf")}, "temperature must be a number"),
        ({"temperature": 10**400}, "temperature must be a number .*, not an integer of 1329 bits"),
        ({"temperature": True}, "temperature must be a number"),
        ({"temperature": [1]}, "temperature must be a number"),
        ({"temperature": "1_0"}, "temperature must be a number"),
        ({"temperature": "٣"}, "temperature must be a number"),
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], not 0"),
        ({"top_p": 1.5}, r"top_p must be a number in \(0, 1\]"),
        ({"min_p": -1}, r"min_p must be a number in \[0, 1\]"),
        ({"top_k": -2}, r"top_k must be an integer in \[0, 2\^31-1\] or -1, not -2"),
        ({"max_tokens": 0}, r"max_tokens must be an integer in \[1, 2\^31-1\], not 0"),
        ({"max_tokens": -5}, "max_tokens must be an integer"),
        ({"max_tokens": 2**31}, "max_tokens must be an integer"),
        ({"max_tokens": 1.5}, "max_tokens must be an integer"),
        ({"max_tokens": "many"}, "max_tokens must be an integer .*, not 'many'"),
        ({"max_tokens": "9" * 5000}, "max_tokens must be an integer"),
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"max_tokens": {}}, "max_tokens must be an integer"),
        ({"min_tokens": -1}, "min_tokens must be an integer"),
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens must be in \[0, max_tokens\]; it is 5 of 4"),
        ({"seed": 2**63}, r"seed must be an integer in \[-2\^63, 2\^63-1\], not 9223372036854775808"),
        ({"seed": 1.8446744073709552e19}, "seed .*integers of 2.63 and more arrive rounded"),
        ({"seed": 9.3e15}, "seed .* arrive rounded"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
        ({"ignore_eos": "yes"}, "ignore_eos must be true or false, not 'yes'"),
        ({"stop": ["ok", ""]}, "stop must be .*; one entry is ''"),
        ({"stop": [1]}, "stop must be .*; one entry is 1"),
        ({"stop": 5}, "stop must be a string or a list"),
        ({"stop": ["x"] * 65}, "stop must be .* at most 64 strings.*, not a list of 65 entries"),
        ({"stop": ["x"] * 10_000}, "not a list of 10000 entries"),
        ({"stop": "x" * 1025}, "each of 1 to 1024 characters"),
        ({"stop": "\ud800"}, "stop has an entry with a lone surrogate"),
        ({"stop_token_ids": [1] * 257}, "stop_token_ids must be a list of at most 256 integers"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be .*; one entry is -1"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids must be .*; one entry is 1.0"),
        ({"stop_token_ids": [True]}, "one entry is True"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"stop_token_ids": "[1,"}, "stop_token_ids must be a list"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be an integer"),
        ({"prompt_token_ids": [2**31]}, "prompt_token_ids must be .*; one entry is 2147483648"),
        ({"prompt_token_ids": "[" * 100_000}, "prompt_token_ids must be a list"),
        ({"priority": 2**31}, r"priority must be an integer in \[-2\^31, 2\^31-1\]"),
        ({"timeout_ms": 0}, "timeout_ms must be an integer in"),
        ({"timeout": -1}, "timeout must be an integer in"),
        ({"id": "x" * 257}, "id must be a string of at most 256 printable characters"),
        ({"id": "a\nb"}, "id must be .* printable"),
        ({"cache_salt": "\ud800"}, "cache_salt must be .* printable"),
        ({"cache_salt": 5}, "cache_salt must be a string"),
        ({"max_token": 5}, "unknown parameter 'max_token'; did you mean max_tokens?"),
        ({"max_new_tokens": 5}, "unknown parameter 'max_new_tokens'; did you mean max_tokens?"),
        ({"request_id": "x"}, "unknown parameter 'request_id'; did you mean id?"),
        ({"qqqq": 5}, "unknown parameter 'qqqq'$"),
        ({"x" * 10_000: 5}, r"unknown parameter 'x{60}\.\.\.'"),
        ({"\ud800": 5}, "unknown parameter"),
        ({5: 5}, "unknown parameter '5'"),
        ({"n": 0}, r"n must be an integer in \[1, 128\], not 0"),
        ({"n": "129"}, r"n must be an integer in \[1, 128\], not '129'"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be a number in \[-2, 2\], not 2.1"),
        ({"presence_penalty": False}, r"presence_penalty must be a number in \[-2, 2\], not False"),
        ({"frequency_penalty": "-2.5"}, r"frequency_penalty must be a number in \[-2, 2\], not '-2.5'"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number in \(0, 1000\], not 0"),
        ({"repetition_penalty": -1}, r"repetition_penalty must be a number in \(0, 1000\], not -1"),
        (
            {"logit_bias": {"5": 101}},
            r"logit_bias must be an object of at most 1024 token ids.* \[-100, 100\], not .'5'",
        ),
        ({"logit_bias": {"5": float("nan")}}, r"logit_bias must be .*\[-100, 100\]"),
        ({"logit_bias": {"-5": 1}}, r"logit_bias must be .*\[-100, 100\]; one entry is '-5': 1"),
        ({"logit_bias": {"x": 1}}, r"logit_bias must be .*\[-100, 100\]; one entry is 'x': 1"),
        ({"logit_bias": {"5": "x"}}, r"logit_bias must be .*; one entry is '5': 'x'"),
        ({"logit_bias": {"5": 1, "05": 2}}, "logit_bias must be .*; one entry is '05': 2"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias must be .*, not a dict of 1025 entries"),
        ({"logit_bias": [5]}, "logit_bias must be an object"),
        ({"logit_bias": "5"}, "logit_bias must be an object"),
        ({"bad_words": [""]}, "bad_words must be .*; one entry is ''"),
        ({"bad_words": ["x"] * 257}, "bad_words must be .* at most 256 strings"),
        ({"bad_words": [5]}, "bad_words must be .*; one entry is 5"),
        ({"dry_multiplier": -0.1}, r"dry_multiplier must be a number in \[0, 100\], not -0.1"),
        ({"dry_base": 0.9}, r"dry_base must be a number in \[1, 4\], not 0.9"),
        ({"dry_allowed_length": 0}, r"dry_allowed_length must be an integer in \[1, 50\], not 0"),
        ({"dry_sequence_breakers": ["x" * 65]}, "dry_sequence_breakers must be .* each of 1 to 64 characters"),
        ({"xtc_probability": 1.1}, r"xtc_probability must be a number in \[0, 1\], not 1.1"),
        ({"xtc_threshold": "-1"}, r"xtc_threshold must be a number in \[0, 1\], not '-1'"),
    ],
)
def test_refusals_name_the_field_its_range_and_the_value(given, words):
    with pytest.raises(InvalidArgument, match=words) as caught:
        parse_parameters(given)
    assert len(caught.value.wire_message().encode()) < 400


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"best_of": 3}, "best_of=3 is not supported"),
        (
            {"guided_regex": "null"},
            r"guided_regex='null' is not supported; structured_outputs={\"regex\": …} is its name now",
        ),
        ({"guided_json": {}}, "guided_json="),
        ({"lora_name": "x"}, "lora_name='x' is not supported$"),
        (
            {"spaces_between_special_tokens": "both"},
            "spaces_between_special_tokens='both' is not supported; only true or",
        ),
    ],
)
def test_what_is_not_supported_yet_is_refused_by_name(given, words):
    with pytest.raises(InvalidArgument, match=words):
        parse_sampling_params(given)


def test_but_not_where_it_makes_no_difference():
    neutral = {
        "n": 1, "best_of": "1", "presence_penalty": 0.0, "frequency_penalty": "0", "repetition_penalty": 1.0,
        "logprobs": False, "top_logprobs": 0, "logit_bias": {}, "bad_words": "[]", "lora_name": None,
        "spaces_between_special_tokens": True, "use_beam_search": False, "response_format": {"type": "text"},
    }  # fmt: skip
    assert parse_sampling_params(neutral) == SamplingParams()
    assert parse_sampling_params(dict.fromkeys(NEUTRAL)) == SamplingParams()


def test_also_in_the_words_of_python_and_of_clients_that_know_only_text():
    neutral = {
        "use_beam_search": "False", "early_stopping": "True", "spaces_between_special_tokens": "True",
        "detokenize": " true", "logprobs": "False", "lora_name": "", "guided_json": "", "n": "1", "top_p": "",
        "presence_penalty": "0.0", "logit_bias": "{}",
    }  # fmt: skip
    assert parse_sampling_params(neutral) == SamplingParams()
    assert parse_sampling_params(dict.fromkeys((*NEUTRAL, "temperature", "stop", "seed"), "")) == SamplingParams()
    for refused in ({"use_beam_search": "True"}, {"best_of": "2"}, {"detokenize": "False"}):
        with pytest.raises(InvalidArgument, match="is not supported"):
            parse_sampling_params(refused)


def test_names_are_either_supported_or_not():
    assert not set(PARAMETERS) & set(NEUTRAL)


def test_the_models_defaults_yield_to_the_requests_values():
    defaults = {"temperature": 0.6, "top_k": 20, "max_tokens": 100}
    params = parse_sampling_params({"temperature": 0, "top_k": None}, defaults)
    assert (params.temperature, params.top_k, params.max_tokens) == (0.0, 20, 100)
    with pytest.raises(InvalidArgument, match=r"it is 200 of 100 \(the model's default\)"):
        parse_sampling_params({"min_tokens": 200}, defaults)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*PARAMETERS, *NEUTRAL]) | st.text(st.characters(), max_size=10)


@settings(max_examples=500, deadline=None)
@given(st.dictionaries(NAMES, JSON | JSON.map(repr) | JSON.map(json.dumps), max_size=4))
def test_any_values_give_parameters_in_range_or_an_invalid_argument(values):
    try:
        parsed = parse_parameters(values)
    except InvalidArgument as error:
        error.wire_message().encode()  # it can be sent
        return
    sampling, options = parsed.sampling, parsed.options
    assert 0 <= sampling.temperature <= 1000 and 0 <= sampling.min_p <= 1 and 0 < sampling.top_p <= 1
    assert 0 <= sampling.top_k < 2**31 and 0 <= sampling.min_tokens <= (sampling.max_tokens or 2**31)
    assert sampling.seed is None or -(2**63) <= sampling.seed < 2**63
    assert all(stop.encode() for stop in sampling.stop)
    assert all(type(i) is int for i in (*sampling.stop_token_ids, *(options.prompt_token_ids or ()), options.priority))
    assert options.timeout_s is None or options.timeout_s > 0
    assert all(type(token) is int and -100 <= bias <= 100 for token, bias in sampling.logit_bias.items())
    assert 0 < sampling.repetition_penalty <= 1000 and 1 <= sampling.dry_base <= 4


@pytest.mark.parametrize("parameter", TABLE, ids=lambda parameter: parameter.name)
def test_an_error_names_the_parameter_and_what_it_accepts(parameter):
    with pytest.raises(InvalidArgument) as error:
        parse_parameters({parameter.name: {"of another": "type"}})
    assert parameter.name in error.value.message
    assert parameter.range() in error.value.message or parameter.kind in ("structure", "token_map")
