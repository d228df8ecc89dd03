"""Words as tokens: each form that vLLM bans, breakers of repetitions, and what is refused."""

import json

import pytest

from flashserve.errors import InvalidArgument
from flashserve.protocol import SamplingParams
from flashserve.text.tokenizer import Tokenizer
from flashserve.text.words import with_word_ids
from parsed_requests import LIMITS, TOKENIZER, parsed, refused
from small_tokenizers import sentencepiece

PLAIN = Tokenizer(sentencepiece())


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def test_a_word_is_ruled_out_at_the_beginning_and_within_a_text():
    params = with_word_ids(SamplingParams(bad_words=(" the",)), TOKENIZER, LIMITS)
    assert params.bad_word_ids == (ids("the"), ids(" the"))
    assert len(ids("the")) == len(ids(" the")) == 1 and not params.needs_known_tokens


@pytest.mark.parametrize("word", ["xyz", "hello"])
def test_a_form_of_more_or_fewer_tokens_is_left_out_as_in_vllm(word):
    params = with_word_ids(SamplingParams(bad_words=(word,)), TOKENIZER, LIMITS)
    assert params.bad_word_ids == (ids(word),) and len(ids(f" {word}")) != len(ids(word))
    assert params.needs_known_tokens


def test_a_tokenizer_that_writes_a_space_before_every_text_has_one_form():
    params = with_word_ids(SamplingParams(bad_words=("hello",)), PLAIN, LIMITS)
    assert params.bad_word_ids[0] == tuple(PLAIN.encode("hello", add_special_tokens=False))


def test_breakers_are_tokens_behind_other_text():
    params = SamplingParams(dry_multiplier=0.8, dry_sequence_breakers=("\n", ":"))
    assert with_word_ids(params, TOKENIZER, LIMITS).dry_breaker_ids == (ids("a\n")[-1], ids("a:")[-1])
    off = SamplingParams(dry_sequence_breakers=("\n",))
    assert with_word_ids(off, TOKENIZER, LIMITS) is off


def test_a_request_brings_them_to_the_engine():
    sampling = {"bad_words": ["the"], "dry_multiplier": "0.8", "logit_bias": {"5": 1}, "presence_penalty": 0.5}
    params = parsed(text_input="hello", sampling_parameters=sampling).message.params
    assert params.bad_word_ids == (ids("the"), ids(" the"))
    assert params.logit_bias == {5: 1.0} and params.penalizes
    breakers = tuple(ids(f"a{text}")[-1] for text in SamplingParams().dry_sequence_breakers)
    assert params.dry_breaker_ids == breakers


def test_what_no_token_of_the_model_means_is_refused():
    unknown = LIMITS.vocab_size
    words = rf"logit_bias: token id {unknown} is not in the model's range \[0, {unknown - 1}\]"
    refused(words, text_input="a", sampling_parameters=json.dumps({"logit_bias": {str(unknown): 1}}))
    refused("bad_words must be words of at least one token", text_input="a", sampling_parameters={"bad_words": ["  "]})
    small = LIMITS.__class__(**{name: getattr(LIMITS, name) for name in LIMITS.__struct_fields__} | {"vocab_size": 3})
    with pytest.raises(InvalidArgument, match="bad_words: token id"):
        with_word_ids(SamplingParams(bad_words=("the",)), TOKENIZER, small)
