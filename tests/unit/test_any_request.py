"""Whatever is in a Triton request: it is valid, or an InvalidArgument."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.errors import InvalidArgument
from flashserve.frontend.request_parser import ParsedTokenize, RawRequest, parse
from flashserve.frontend.tensor_spec import INPUTS
from parsed_requests import CONTEXT, LIMITS, objects

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(st.characters(), max_size=20)
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT}) | st.fixed_dictionaries(
    {}, optional={"role": JSON, "content": JSON, "tool_calls": JSON, "name": JSON}
)
CHAT = st.fixed_dictionaries(
    {},
    optional={
        "messages": JSON | st.lists(MESSAGE, max_size=3),
        "tools": JSON,
        "chat_template_kwargs": JSON,
        "add_generation_prompt": JSON,
        "continue_final_message": JSON,
        "text": JSON,
        "token_ids": JSON,
    },
)
SAMPLING = st.dictionaries(
    st.sampled_from(["max_tokens", "temperature", "stop", "prompt_token_ids", "truncate_prompt_tokens", "n", "id"])
    | st.text(max_size=4),
    JSON,
    max_size=3,
)
CONTENT = (
    st.binary(max_size=30)
    | st.text(max_size=30).map(str.encode)
    | (CHAT | SAMPLING).map(lambda value: json.dumps(value).encode())
)
ARRAYS = st.one_of(
    st.lists(CONTENT, min_size=1, max_size=1).map(lambda items: objects(*items)),
    st.lists(CONTENT, max_size=3).map(lambda items: objects(*items)),
    st.lists(st.booleans(), min_size=1, max_size=2).map(np.array),
    st.integers(-(2**31), 2**31 - 1).map(lambda value: np.array([value], dtype=np.int32)),
    st.floats().map(lambda value: np.array([value])),
)


def one_tensor(name: str, values: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[str, np.ndarray]]:
    return values.map(lambda value: {name: objects(value)})


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    return values.map(lambda value: json.dumps(value).encode())


# Half of the requests have a proper prompt, so that what is random beside it gets a chance.
PROMPT = (
    one_tensor("text_input", st.text(max_size=60).map(str.encode))
    | one_tensor(
        "chat_request", as_json(st.fixed_dictionaries({"messages": st.lists(MESSAGE, min_size=1, max_size=2)}))
    )
    | one_tensor("tokenize_request", as_json(st.fixed_dictionaries({"text": TEXT})))
    | one_tensor(
        "sampling_parameters",
        as_json(st.fixed_dictionaries({"prompt_token_ids": st.lists(st.integers(0, LIMITS.vocab_size), max_size=110)})),
    )
    | one_tensor(
        "embedding_request",
        as_json(
            st.fixed_dictionaries(
                {"input": TEXT | st.lists(st.integers(0, LIMITS.vocab_size), max_size=110)},
                optional={
                    "pooling_params": st.dictionaries(st.sampled_from(["pooling", "dimensions", "normalize"]), JSON)
                },
            )
        ),
    )
    | st.just({})
)


@settings(max_examples=500, deadline=None)
@given(
    prompt=PROMPT,
    others=st.just({}) | st.dictionaries(st.sampled_from([spec.name for spec in INPUTS]), ARRAYS, max_size=2),
    parameters=st.just({})
    | st.dictionaries(st.text(max_size=5) | st.sampled_from(["stream", "stop", "timeout"]), JSON, max_size=1),
    request_id=st.just("") | st.text(st.characters(), max_size=4),
)
def test_any_bytes_in_any_tensor_give_a_valid_request_or_an_invalid_argument(prompt, others, parameters, request_id):
    inputs = {**others, **prompt}
    try:
        result = parse(RawRequest(inputs, parameters, request_id), CONTEXT, 7)
    except InvalidArgument as error:
        error.wire_message().encode()
        return
    if isinstance(result, ParsedTokenize):
        json.loads(result.answer)
        result.answer.encode()
    elif result.message.pooling is not None:
        assert 1 <= len(result.message.prompt_token_ids) <= 100
        assert (result.message.params.max_tokens, result.stream) == (0, False)
    else:
        assert 1 <= len(result.message.prompt_token_ids) <= 99
        assert all(0 <= token_id < LIMITS.vocab_size for token_id in result.message.prompt_token_ids)
        assert result.message.params.max_tokens is not None
        assert 1 <= result.message.params.max_tokens <= 100 - len(result.message.prompt_token_ids)
        result.prompt_text.encode()
