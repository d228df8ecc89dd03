"""A stop string ends its request even if it is a special token, which never becomes text."""

from __future__ import annotations

from typing import Any

import pytest

from parsed_requests import TOKENIZER, parsed

IM_END = 2  # its id in the small tokenizer


def stop_ids(**parameters: Any) -> tuple[int, ...]:
    return parsed(text_input="hello", sampling_parameters=parameters).message.params.stop_token_ids


def test_a_stop_string_that_is_a_special_token_stops_at_its_id() -> None:
    assert TOKENIZER.decode([IM_END], skip_special_tokens=False) == "<|im_end|>"
    assert stop_ids(stop=["\n\n", "<|im_end|>"]) == (IM_END,)
    assert stop_ids(stop=["<|im_end|>"], stop_token_ids=[IM_END, 9]) == (IM_END, 9)


@pytest.mark.parametrize("stop", ["<tool>", "hello", "<|im_end|>x"])
def test_text_is_found_in_the_text_alone(stop: str) -> None:
    assert stop_ids(stop=[stop]) == ()


def test_where_special_tokens_are_text_they_are_found_there() -> None:
    assert stop_ids(stop=["<|im_end|>"], skip_special_tokens=False) == ()
