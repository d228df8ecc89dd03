"""Triton requests: what each input means, what is refused, and that nothing else can happen."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flashserve.config import EngineConfig
from flashserve.errors import ConfigError, InvalidArgument
from flashserve.frontend.request_parser import (
    OutputFlags,
    ParsedTokenize,
    ParserContext,
    RawRequest,
    parse,
    read_raw,
)
from flashserve.model_card import read_model_card
from flashserve.protocol import EngineReady
from flashserve.text.chat_template import ChatTemplate
from flashserve.text.tokenizer import Tokenizer
from parsed_requests import CONTEXT, LIMITS, TEMPLATE, TOKENIZER, objects, parsed, raw, refused
from small_tokenizers import byte_level, sentencepiece

LLAMA = Tokenizer(sentencepiece())


# --- prompts -------------------------------------------------------------------------------------------------


def test_a_text_alone_is_a_request():
    request = parsed(text_input="hello world")
    assert request.message.prompt_token_ids == TOKENIZER.encode("hello world")
    assert request.message.params.max_tokens == 16
    assert (request.stream, request.prompt_text) == (False, "hello world")
    assert (request.message.priority, request.message.arrival, request.message.deadline, request.request_id) == (
        0,
        1000.0,
        None,
        "",
    )
    assert request.outputs == OutputFlags()


def test_a_chat_is_rendered_and_its_special_tokens_are_the_templates():
    llama = ParserContext(LLAMA, ChatTemplate("<s>" + TEMPLATE, {}), LIMITS)
    chat = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    request = parsed(llama, chat_request=chat)
    assert request.prompt_text == "<s><|im_start|>user:hi<|im_end|>"
    assert request.message.prompt_token_ids.count(1) == 1  # text_input would have got a second <s>
    assert parsed(llama, text_input="hi").message.prompt_token_ids[0] == 1


def test_token_ids_come_with_the_sampling_parameters():
    request = parsed(sampling_parameters={"prompt_token_ids": [5, 6, 7]})
    assert request.message.prompt_token_ids == [5, 6, 7]
    assert request.prompt_text == TOKENIZER.decode([5, 6, 7])
    assert parsed(parameters={"prompt_token_ids": "[5, 6, 7]"}).message.prompt_token_ids == [5, 6, 7]


def test_exactly_one_prompt():
    refused("exactly one of text_input, .*, prompt_token_ids is needed; none is given")
    refused("text_input and chat_request are given", text_input="a", chat_request="{}")
    refused("text_input and prompt_token_ids are given", text_input="a", sampling_parameters={"prompt_token_ids": [1]})


def test_what_the_model_cannot_take_yet_is_refused_by_name():
    refused("image is not supported", text_input="a", image=np.array([b"x", b"y"], dtype=object))


def test_an_empty_prompt_is_refused():
    refused("text_input is empty: a prompt needs at least one token", text_input="")
    refused("prompt_token_ids is empty", sampling_parameters={"prompt_token_ids": []})
    assert parsed(ParserContext(LLAMA, ChatTemplate(None, {}), LIMITS), text_input="").message.prompt_token_ids == [1]


def test_a_prompt_must_leave_room_for_one_token():
    assert parsed(sampling_parameters={"prompt_token_ids": [5] * 99}).message.params.max_tokens == 1
    refused(
        r"prompt has 100 tokens, the model's context takes at most 100 \(prompt \+ at least one output token\)",
        sampling_parameters={"prompt_token_ids": [5] * 100},
    )
    refused("prompt has 500 tokens", text_input="5\n" * 250)
    refused("text_input has 1000000 bytes; more than .* cannot fit into 99 tokens", text_input="a" * 1_000_000)


def test_a_prompt_is_cut_to_its_end_if_asked_for():
    prompt = list(range(3, 203))
    request = parsed(sampling_parameters={"prompt_token_ids": prompt, "truncate_prompt_tokens": 10})
    assert request.message.prompt_token_ids == prompt[-10:]
    long = "word " * 1000
    assert (
        parsed(text_input=long, sampling_parameters={"truncate_prompt_tokens": 10}).message.prompt_token_ids
        == (TOKENIZER.encode(long)[-10:])
    )
    whole = parsed(sampling_parameters={"prompt_token_ids": prompt, "truncate_prompt_tokens": -1})
    assert whole.message.prompt_token_ids == prompt[-99:]  # as many as leave room for one
    refused("prompt has 150 tokens", sampling_parameters={"prompt_token_ids": prompt, "truncate_prompt_tokens": 150})


def test_token_ids_must_be_in_the_models_vocabulary():
    last = LIMITS.vocab_size - 1
    assert parsed(sampling_parameters={"prompt_token_ids": [last]})
    refused(
        rf"prompt_token_ids: token id {last + 1} is not in the model's range \[0, {last}\]",
        sampling_parameters={"prompt_token_ids": [0, last + 1]},
    )
    refused("stop_token_ids: token id", text_input="a", sampling_parameters={"stop_token_ids": [last + 1]})
    refused("prompt_token_ids must be .*; one entry is -1", sampling_parameters={"prompt_token_ids": [-1]})


def test_output_never_exceeds_the_context():
    request = parsed(sampling_parameters={"prompt_token_ids": [5] * 90, "max_tokens": 50, "min_tokens": 20})
    assert (request.message.params.max_tokens, request.message.params.min_tokens) == (10, 10)
    assert parsed(text_input="a", sampling_parameters={"max_tokens": 5}).message.params.max_tokens == 5


# --- where settings may be given -----------------------------------------------------------------------------


def test_sampling_parameters_may_be_json_or_the_requests_own():
    for request in (
        parsed(text_input="a", sampling_parameters={"temperature": 0.5, "max_tokens": "7", "min_tokens": "2"}),
        parsed(text_input="a", parameters={"temperature": "0.5", "max_tokens": 7, "min_tokens": 2}),
        parsed(text_input="a", parameters={"temperature": 0.5, "min_tokens": 2}, max_tokens=7),
        parsed(text_input="a", parameters={"min_tokens": 2}, sampling_parameters={"temperature": 0.5}, max_tokens=7),
    ):
        assert (
            request.message.params.temperature,
            request.message.params.max_tokens,
            request.message.params.min_tokens,
        ) == (0.5, 7, 2)


def test_the_same_value_twice_is_fine_and_two_values_are_not():
    assert parsed(text_input="a", parameters={"top_k": "5"}, sampling_parameters={"top_k": 5}).message.params.top_k == 5
    refused(
        "top_k is given twice, as 6 and as 5", text_input="a", parameters={"top_k": 6}, sampling_parameters={"top_k": 5}
    )
    refused("max_tokens is given twice", text_input="a", max_tokens=6, sampling_parameters={"max_tokens": 5})
    refused("max_tokens is given twice", text_input="a", max_tokens=6, parameters={"max_tokens": 5})
    refused("stream is given twice", text_input="a", stream=True, parameters={"stream": False})


def test_flags_may_be_tensors_or_parameters():
    wanted = OutputFlags(finish_reason=True, num_input_tokens=True, num_output_tokens=True, request_metrics=True)
    names = ("return_finish_reason", "return_num_input_tokens", "return_num_output_tokens", "return_request_metrics")
    assert parsed(text_input="a", **dict.fromkeys(names, True)).outputs == wanted
    assert parsed(text_input="a", parameters=dict.fromkeys(names, "true")).outputs == wanted
    assert parsed(text_input="a", **dict.fromkeys(names, False)).outputs == OutputFlags()
    assert parsed(text_input="a", parameters={"stream": True}).stream
    refused("stream must be true or false, not 'maybe'", text_input="a", parameters={"stream": "maybe"})


def test_inputs_do_not_belong_into_sampling_parameters():
    refused("stream is an input of its own", text_input="a", sampling_parameters={"stream": True})
    refused("text_input must be an input tensor", parameters={"text_input": "a"})


def test_the_prompt_is_repeated_unless_streaming_or_told_not_to():
    assert parsed(text_input="hi").prompt_text == "hi"
    assert parsed(text_input="hi", exclude_input_in_output=False).prompt_text == "hi"
    for flags in (
        {"exclude_input_in_output": True},
        {"stream": True},
        {"stream": True, "exclude_input_in_output": True},
    ):
        assert parsed(text_input="hi", **flags).prompt_text == ""
    refused(
        "When streaming, `exclude_input_in_output` = False is not allowed",
        text_input="hi",
        stream=True,
        exclude_input_in_output=False,
    )


@pytest.mark.parametrize(
    ("logprobs", "flags", "computed"),
    [
        (None, {"return_logprobs": False, "return_cumulative_logprob": False}, None),  # of Triton's OpenAI frontend
        (None, {"return_logprobs": True}, None),
        (3, {}, None),
        (3, {"return_logprobs": True}, 3),
        (3, {"return_cumulative_logprob": True}, 0),
        (None, {"return_cumulative_logprob": True}, 0),
        (0, {"return_cumulative_logprob": True, "return_logprobs": True}, 0),
    ],
)
def test_only_log_probabilities_that_an_output_shows_are_computed(logprobs, flags, computed):
    request = parsed(text_input="a", parameters={} if logprobs is None else {"logprobs": logprobs}, **flags)
    assert request.message.params.logprobs == computed
    assert request.shows_logprobs == (logprobs is not None)
    assert request.outputs == OutputFlags(**{name.removeprefix("return_"): flag for name, flag in flags.items()})


def test_what_load_generators_and_tritons_openai_frontend_send():
    perf = {"max_tokens": "16", "min_tokens": "16"}
    request = parsed(text_input="a", exclude_input_in_output=True, stream=True, sampling_parameters=perf)
    assert (request.message.params.max_tokens, request.message.params.min_tokens) == (16, 16)
    openai = {
        "frequency_penalty": 0.0, "logprobs": False, "max_tokens": 16, "n": 1, "presence_penalty": 0.0,
        "temperature": 0.7, "top_p": 1.0, "stop": ["\n"],
    }  # fmt: skip
    request = parsed(
        text_input="a", stream=False, exclude_input_in_output=True, sampling_parameters=openai, return_logprobs=False,
        return_num_input_tokens=True, return_num_output_tokens=True,
    )  # fmt: skip
    assert request.message.params.temperature == 0.7 and request.message.params.stop == ("\n",)


def test_what_triton_itself_passes_on():
    request = parsed(text_input="a", parameters={"id": "abc", "timeout": 3_000_000, "priority": 2})
    assert (request.request_id, request.message.deadline, request.message.priority) == ("abc", 1003.0, 2)
    request = parsed(text_input="a", request_id="xyz", timeout_us=1_500_000, sampling_parameters={"priority": -1})
    assert (request.request_id, request.message.deadline, request.message.priority) == ("xyz", 1001.5, -1)
    assert parsed(text_input="a", parameters={"triton_enable_empty_final_response": True})


def test_a_deadline_counts_from_arrival():
    assert parsed(text_input="a", sampling_parameters={"timeout_ms": 250}).message.deadline == 1000.25


def test_tokens_are_looked_at_one_by_one_only_if_somebody_needs_it():
    assert not parsed(text_input="a").needs_every_token
    assert parsed(text_input="a", stream=True).needs_every_token
    assert parsed(text_input="a", sampling_parameters={"stop": "x"}).needs_every_token


# --- broken requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text_input": objects()}, "text_input must have exactly one element, not 0"),
        ({"text_input": objects(b"a", b"b")}, "text_input must have exactly one element, not 2"),
        ({"text_input": np.array([1.5], dtype=np.float32)}, "text_input must be a tensor of type STRING.* float32"),
        ({"text_input": b"ab\xff"}, "text_input is not valid UTF-8 at byte 2"),
        ({"text_input": b"\xed\xa0\x80"}, "text_input is not valid UTF-8 at byte 0"),  # a surrogate in disguise
        ({"text_input": "a", "stream": np.array([1], dtype=np.int32)}, "stream must be a tensor of type BOOL"),
        ({"text_input": "a", "stream": np.array([], dtype=bool)}, "stream must have exactly one element, not 0"),
        ({"text_input": "a", "max_tokens": np.array([1.0])}, "max_tokens must be a tensor of type INT32"),
        ({"text_input": "a", "max_tokens": np.array([True])}, "max_tokens must be a tensor of type INT32"),
        ({"text_input": "a", "max_tokens": -1}, "max_tokens must be an integer in"),
        ({"text_input": "a", "sampling_parameters": "{"}, "sampling_parameters is not valid JSON: "),
        ({"text_input": "a", "sampling_parameters": ""}, "sampling_parameters is not valid JSON: "),
        ({"text_input": "a", "sampling_parameters": "[1]"}, "sampling_parameters must be a JSON object, not a list"),
        ({"text_input": "a", "sampling_parameters": "null"}, "sampling_parameters must be a JSON object, not null"),
        ({"text_input": "a", "sampling_parameters": '{"seed": NaN}'}, "sampling_parameters holds NaN"),
        ({"text_input": "a", "sampling_parameters": '{"seed": 1, "seed": 2}'}, "has the key 'seed' twice"),
        ({"text_input": "a", "sampling_parameters": "[" * 100_000}, "sampling_parameters is nested too deeply"),
        ({"text_input": "a", "sampling_parameters": '{"a":' * 100_000}, "sampling_parameters is nested too deeply"),
        ({"text_input": "a", "sampling_parameters": '{"seed": %s}' % ("9" * 5000)}, "is not valid JSON"),
        ({"text_input": "a", "sampling_parameters": '{"temperature": 1e999}'}, "temperature must be a number"),
        ({"text_input": "a", "sampling_parameters": '{"stop": "\\ud800"}'}, "stop has an entry with a lone surrogate"),
        ({"text_input": "a", "sampling_parameters": '{"\\ud800": 1}'}, "unknown parameter"),
        ({"chat_request": "hello"}, "chat_request is not valid JSON"),
        ({"chat_request": '{"messages": [{"role": "user", "content": "\\ud800"}]}'}, "has a lone surrogate"),
    ],
)  # fmt: skip
def test_broken_inputs_are_refused_by_name(inputs, words):
    refused(words, **inputs)


def test_one_element_of_any_shape_will_do():
    assert parsed(text_input=objects(b"hi").reshape(1, 1), stream=np.array([[True]])).stream


# --- tokenize_request ----------------------------------------------------------------------------------------


def tokenized(request: dict[str, Any], **others: Any) -> dict[str, Any]:
    result = parse(raw(tokenize_request=json.dumps(request), **others), CONTEXT, 7)
    assert isinstance(result, ParsedTokenize)
    return json.loads(result.answer)


def test_text_and_messages_and_ids_are_answered_without_the_engine():
    ids = TOKENIZER.encode("héllo")
    assert tokenized({"text": "héllo"}) == {"token_ids": ids, "count": len(ids), "max_model_len": 100}
    assert tokenized({"text": ""}) == {"token_ids": [], "count": 0, "max_model_len": 100}
    assert tokenized({"token_ids": ids}) == {"text": "héllo"}
    prompt = "<|im_start|>user:hi<|im_end|>"
    ids = TOKENIZER.encode(prompt)
    answer = {"token_ids": ids, "count": len(ids), "max_model_len": 100, "prompt": prompt}
    assert tokenized({"messages": [{"role": "user", "content": "hi"}]}) == answer
    assert tokenized({"token_ids": ids}) == {"text": prompt}


def test_text_longer_than_the_context_can_be_counted():
    assert tokenized({"text": "word " * 1000})["count"] > 100


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({}, "tokenize_request needs exactly one of text, messages, token_ids"),
        ({"text": "a", "token_ids": [1]}, "needs exactly one of"),
        ({"text": 5}, "tokenize_request.text must be a string, not 5"),
        ({"text": "a", "tools": []}, "unknown key 'tools' in tokenize_request with text"),
        ({"text": "\ud800"}, "tokenize_request.text has a lone surrogate"),
        ({"token_ids": "abc"}, "prompt_token_ids must be a list"),
        ({"token_ids": [10**6]}, "tokenize_request.token_ids: token id 1000000 is not in"),
        ({"messages": []}, "tokenize_request.messages must be a list"),
    ],
)
def test_broken_tokenize_requests_are_refused(request_, words):
    refused(words, tokenize_request=json.dumps(request_))


def test_sampling_parameters_mean_nothing_to_it_and_are_refused():
    refused(
        "takes no sampling parameters, but top_k is given", tokenize_request='{"text": "a"}', parameters={"top_k": 5}
    )


# --- Triton's objects and the model's files ------------------------------------------------------------------


def triton_request(parameters: str, **inputs: Any) -> SimpleNamespace:
    tensors = [SimpleNamespace(name=lambda n=name: n, as_numpy=lambda a=array: a) for name, array in inputs.items()]
    return SimpleNamespace(
        inputs=lambda: tensors, parameters=lambda: parameters, request_id=lambda: "r", timeout=lambda: 5
    )


def test_a_triton_request_is_read_once():
    array = objects(b"hi")
    assert read_raw(triton_request('{"top_k": 3}', text_input=array)) == RawRequest(
        {"text_input": array}, {"top_k": 3}, "r", 5
    )
    assert read_raw(triton_request("")).parameters == {}


def test_a_tensor_that_cannot_be_read_is_an_invalid_argument():
    def broken() -> None:
        raise ValueError("unpack")

    request = triton_request("{}")
    request.inputs = lambda: [SimpleNamespace(name=lambda: "text_input", as_numpy=broken)]
    with pytest.raises(InvalidArgument, match="text_input cannot be read: ValueError"):
        read_raw(request)


def engine_of(folder: Any) -> EngineReady:
    byte_level().save(str(folder / "tokenizer.json"))
    return EngineReady(LIMITS, read_model_card(folder))


def test_a_context_is_made_from_what_the_engine_sends(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.25, "max_new_tokens": 9}')
    engine = engine_of(tmp_path)
    context = ParserContext.of_engine(EngineConfig(model="m"), engine)
    request = parsed(context, chat_request='{"messages": [{"role": "user", "content": "hi"}]}')
    assert request.prompt_text == "<|im_start|>user:hi<|im_end|>"
    assert (request.message.params.temperature, request.message.params.max_tokens) == (0.25, 9)
    neutral = ParserContext.of_engine(EngineConfig(model="m", generation_config="vllm"), engine)
    assert parsed(neutral, text_input="a").message.params.temperature == 1.0


def test_impossible_defaults_stop_the_model_from_loading(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    engine = engine_of(tmp_path)
    with pytest.raises(ConfigError, match=r"generation_config\.json.*: temperature must be a number"):
        ParserContext.of_engine(EngineConfig(model="m"), engine)
    with pytest.raises(ConfigError, match=r"override_generation_config.*: top_p must be a number"):
        config = EngineConfig(model="m", override_generation_config={"temperature": 1, "top_p": 7})
        ParserContext.of_engine(config, engine)
