"""The input embedding_request: what it may hold, what goes to the engine, and what comes back."""

import json
import struct

import pytest

from flashserve.pooling_params import EMBEDDING_PARAMS
from flashserve.protocol import PoolingParams, TokenOutput
from flashserve.text.embedding import EmbeddingAnswer
from parsed_requests import LIMITS, TOKENIZER, parsed, refused


def ask(given="hello world", **pooling):
    return json.dumps({"input": given, "pooling_params": pooling})


def test_a_text_and_token_ids():
    request = parsed(embedding_request=json.dumps({"input": "hello world"}))
    assert request.message.prompt_token_ids == TOKENIZER.encode("hello world")
    assert request.message.params == EMBEDDING_PARAMS
    assert request.message.pooling == PoolingParams(pooling="last", dimensions=None, normalize=True)
    assert (request.stream, request.prompt_text, request.needs_every_token) == (False, "", False)
    assert parsed(embedding_request=ask([5, 6])).message.prompt_token_ids == [5, 6]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"pooling": "mean"}, PoolingParams(pooling="mean")),
        ({"pooling": "CLS"}, PoolingParams(pooling="cls")),
        ({"dimensions": 3}, PoolingParams(dimensions=3)),
        ({"dimensions": [3]}, PoolingParams(dimensions=3)),  # the form of Triton's vLLM backend
        ({"dimensions": LIMITS.hidden_size, "normalize": "false"}, PoolingParams(dimensions=8, normalize=False)),
        ({"pooling": None, "dimensions": None, "normalize": None}, PoolingParams()),
    ],
)
def test_pooling_params(given, meant):
    assert parsed(embedding_request=ask(**given)).message.pooling == meant


def test_what_belongs_to_every_request_belongs_to_this_one():
    values = {"priority": 3, "timeout_ms": 1500, "id": "mine", "cache_salt": "s", "truncate_prompt_tokens": 2}
    request = parsed(embedding_request=ask([5, 6, 7]), sampling_parameters=values)
    message = request.message
    assert (message.priority, message.deadline, message.cache_salt) == (3, 1001.5, "s")
    assert (message.prompt_token_ids, request.request_id) == ([6, 7], "mine")


def test_a_prompt_may_fill_the_context():
    assert len(parsed(embedding_request=ask([5] * 100)).message.prompt_token_ids) == 100
    refused("prompt has 101 tokens, the model's context takes at most 100$", embedding_request=ask([5] * 101))
    cut = {"truncate_prompt_tokens": -1}
    assert len(parsed(embedding_request=ask([5] * 200), sampling_parameters=cut).message.prompt_token_ids) == 100
    refused(r"embedding_request.input has .* more than .* cannot fit", embedding_request=ask("a" * 1_000_000))


@pytest.mark.parametrize(
    ("request_json", "words"),
    [
        ("x", "embedding_request is not"),
        ("[]", "embedding_request must be a JSON object"),
        ("{}", "embedding_request.input must be a string or a list of token ids, not None"),
        ('{"input": 5}', "input must be a string or a list of token ids, not 5"),
        ('{"input": ""}', "embedding_request.input is empty"),
        ('{"input": []}', "embedding_request.input is empty"),
        ('{"input": ["a"]}', "^embedding_request.input must be a list of integers .*; one entry is 'a'"),
        ('{"input": [[1]]}', r"one entry is \[1\]"),
        ('{"input": [-1]}', "one entry is -1"),
        ('{"input": [100000]}', "embedding_request.input: token id 100000 is not in the model's range"),
        ('{"input": "a", "model": "b"}', "unknown key 'model' in embedding_request, which takes input and pooling_"),
        ('{"input": "a", "pooling_params": 3}', "embedding_request.pooling_params must be an object, not 3"),
        (ask(pooling="max"), "pooling_params.pooling must be last, mean, cls, not 'max'"),
        (ask(pooling=["last"]), "pooling_params.pooling must be"),
        (
            ask(dimensions=9),
            r"pooling_params.dimensions must be an integer in \[1, 8\], the model's hidden size, not 9",
        ),
        (ask(dimensions=0), "dimensions must be an integer in"),
        (ask(dimensions=[2, 3]), "dimensions must be an integer in"),
        (ask(dimensions=2.5), "dimensions must be an integer in"),
        (ask(dimensions=True), "dimensions must be an integer in"),
        (ask(normalize=3), "pooling_params.normalize must be true or false, not 3"),
        (ask(task="embed"), "unknown key 'task' in pooling_params, which takes pooling, dimensions, normalize"),
    ],
)
def test_what_is_wrong_is_named(request_json, words):
    refused(words, embedding_request=request_json)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"stream": True}, "stream=true: the answer to an embedding_request comes in one piece"),
        ({"exclude_input_in_output": False}, "exclude_input_in_output=false"),
        ({"sampling_parameters": {"temperature": 0}}, "takes no sampling parameters, but temperature is given"),
        ({"parameters": {"n": 2}}, "takes no sampling parameters, but n is given"),
        ({"max_tokens": 3}, "takes no sampling parameters, but max_tokens is given"),
        ({"return_progress": True}, "return_progress=true: only a stream tells"),
        ({"sampling_parameters": {"prompt_token_ids": [1]}}, "embedding_request and prompt_token_ids are given"),
        ({"text_input": "a"}, "text_input and embedding_request are given"),
    ],
)
def test_what_is_about_generated_tokens_is_refused(extra, words):
    refused(words, embedding_request=ask(), **extra)


def answered(values, **pooling):
    answer = EmbeddingAnswer(TOKENIZER, parsed(embedding_request=ask(**pooling)).message)
    answer.take(TokenOutput(7, [], "stop", embedding=struct.pack(f"<{len(values)}f", *values)))
    return answer


def test_the_answer_is_a_json_list():
    answer = answered([3.0, 0.0, 4.0, 1.0], dimensions=3)
    assert json.loads(answer.delta().text) == pytest.approx([0.6, 0, 0.8])  # cut, then of length 1
    assert (answer.finish_reason, answer.token_ids) == ("stop", [])
    third = 1 / 3
    (value,) = json.loads(answered([third], normalize=False).delta().text)
    assert struct.pack("<f", value) == struct.pack("<f", third)  # nine digits are enough


def test_hidden_states_that_overflowed_are_an_error():
    answer = answered([1.0, float("inf")])
    assert (answer.finish_reason, answer.delta().text) == ("error", "")
    assert answer.error is not None and "not finite" in answer.error.message
