"""Requests as Triton hands them to a stub, and the parser's context of a small model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from flashserve.errors import InvalidArgument
from flashserve.frontend.request_parser import ParsedRequest, ParserContext, RawRequest, parse
from flashserve.frontend.tensor_spec import INPUT_BY_NAME
from flashserve.protocol import EngineLimits
from flashserve.text.chat_template import ChatTemplate
from flashserve.text.tokenizer import Tokenizer
from small_tokenizers import byte_level

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
TOKENIZER = Tokenizer(byte_level())
LIMITS = EngineLimits(
    max_model_len=100, max_num_seqs=8, max_num_batched_tokens=64, block_size=16, num_blocks=99,
    vocab_size=TOKENIZER.vocab_size + 5, eos_token_ids=(0,), dtype="float32", device="cpu", hidden_size=8,
)  # fmt: skip
CONTEXT = ParserContext(TOKENIZER, ChatTemplate(TEMPLATE, {}), LIMITS, now=lambda: 1000.0)


def objects(*values: Any) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def tensor(name: str, value: Any) -> np.ndarray:
    """What Triton hands over for an input of one element."""
    if isinstance(value, np.ndarray):
        return value
    if INPUT_BY_NAME[name].dtype == "STRING":
        return objects(value.encode() if isinstance(value, str) else value)
    return np.array([value], dtype=bool if INPUT_BY_NAME[name].dtype == "BOOL" else np.int32)


def raw(
    parameters: dict[str, Any] | None = None, request_id: str = "", timeout_us: int = 0, **inputs: Any
) -> RawRequest:
    if isinstance(inputs.get("sampling_parameters"), dict):
        inputs["sampling_parameters"] = json.dumps(inputs["sampling_parameters"])
    arrays = {name: tensor(name, value) for name, value in inputs.items()}
    return RawRequest(arrays, parameters or {}, request_id, timeout_us)


def parsed(context: ParserContext = CONTEXT, **request: Any) -> ParsedRequest:
    result = parse(raw(**request), context, 7)
    assert isinstance(result, ParsedRequest)
    return result


def refused(words: str, context: ParserContext = CONTEXT, **request: Any) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        parse(raw(**request), context, 7)
    caught.value.wire_message().encode()
