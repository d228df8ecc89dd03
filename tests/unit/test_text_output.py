"""One request's text: which tokens count, where it ends, and what the last token shows."""

import pytest

from flashserve.protocol import ErrorInfo, GenerateRequest, SamplingParams, TokenOutput
from flashserve.text.completion import Completion, Delta
from flashserve.text.output import TextDelta, TextStream
from flashserve.text.tokenizer import Tokenizer
from small_tokenizers import byte_level, sentencepiece, word_piece

TOKENIZER = Tokenizer(byte_level())
EOS = 0


def ids(text: str) -> list[int]:
    """One token per character: nothing depends on what the small tokenizer has merged."""
    return [token for char in text for token in TOKENIZER.encode(char)]


def stream(**params) -> TextStream:
    return TextStream(TOKENIZER, SamplingParams(**params))


def test_without_stop_strings_every_token_counts():
    text = stream()
    assert text.push(ids("hello")) == TextDelta("hello", 5, False)
    assert text.push(ids(" you")) == TextDelta(" you", 4, False)
    assert text.finish() == ""


def test_the_count_ends_with_the_token_that_completed_the_stop_string():
    text = stream(stop=("lo w",))
    assert text.push(ids("he")) == TextDelta("he", 2, False)
    assert text.push(ids("llo world")) == TextDelta("l", 5, True)  # "llo w"; "orld" was computed in vain


def test_after_a_stop_string_nothing_follows():
    text = stream(stop=("b",))
    text.push(ids("abc"))
    assert text.push(ids("def")) == TextDelta("", 0, False)
    assert text.finish() == ""


def test_a_found_stop_string_is_shown_if_asked_for():
    assert stream(stop=("lo",), include_stop_str_in_output=True).push(ids("hello you")) == TextDelta("hello", 5, True)


def test_the_rest_of_the_token_that_completes_a_stop_string_is_dropped():
    token = TOKENIZER.encode("hello")  # a single token, or few: the text ends inside the last one
    delta = stream(stop=("hel",), include_stop_str_in_output=True).push(token)
    assert (delta.text, delta.stopped) == ("hel", True)


def test_stop_strings_within_min_tokens_do_not_count():
    text = stream(stop=("b",), min_tokens=3)
    assert text.push(ids("abcdb!")) == TextDelta("abcd", 5, True)


def test_a_stop_string_may_begin_within_min_tokens():
    assert stream(stop=("cd",), min_tokens=3).push(ids("abcd")) == TextDelta("ab", 4, True)


def test_min_tokens_count_over_several_pushes():
    text = stream(stop=("b",), min_tokens=3)
    assert [text.push(ids(char)).stopped for char in "bbbb"] == [False, False, False, True]


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_the_token_that_ended_the_request_counts_but_is_not_shown(stop):
    text = stream(stop=stop, stop_token_ids=tuple(ids("!")))
    assert text.push(ids("hi!"), ended_by_stop_token=True) == TextDelta("hi", 3, False)
    assert text.finish() == ""


@pytest.mark.parametrize("stop", [(), ("zzz",)])
def test_or_shown_if_asked_for(stop):
    text = stream(stop=stop, include_stop_str_in_output=True)
    assert text.push(ids("hi!"), ended_by_stop_token=True) == TextDelta("hi!", 3, False)


def test_an_end_of_sequence_token_stays_invisible_even_then_because_it_is_special():
    text = stream(include_stop_str_in_output=True)
    assert text.push([*ids("hi"), EOS], ended_by_stop_token=True) == TextDelta("hi", 3, False)
    text = stream(include_stop_str_in_output=True, skip_special_tokens=False)
    assert text.push([*ids("hi"), EOS], ended_by_stop_token=True) == TextDelta("hi<|endoftext|>", 3, False)


def test_held_back_text_comes_at_the_end():
    text = stream(stop=("STOP",))
    assert text.push(ids("no ST")) == TextDelta("no ", 5, False)
    assert text.finish() == "ST"
    assert text.finish() == ""


def test_an_incomplete_character_is_replaced_at_the_end():
    text = stream(stop=("STOP",))
    first_byte = TOKENIZER.encode("ß")[:1] if len(TOKENIZER.encode("ß")) > 1 else TOKENIZER.encode("☃")[:1]
    assert text.push(first_byte) == TextDelta("", 1, False)
    assert text.finish() == "\ufffd"


def test_output_continues_a_prompt_and_keeps_its_leading_space():
    llama = Tokenizer(sentencepiece())
    token = [llama._tokenizer.token_to_id("▁world")]
    assert TextStream(llama, SamplingParams()).push(token).text == " world"


def test_text_does_not_depend_on_how_tokens_were_merged_into_pushes():
    tokens = ids("The quick 👋🏽 brown fox, naïve café")
    for size in (1, 2, 3, 7, 100):
        for stop in ((), ("fox",)):
            text = stream(stop=stop)
            deltas = [text.push(tokens[i : i + size]) for i in range(0, len(tokens), size)]
            shown = "".join(delta.text for delta in deltas) + text.finish()
            assert shown == ("The quick 👋🏽 brown " if stop else "The quick 👋🏽 brown fox, naïve café")


def test_a_completion_ends_where_the_text_does():
    completion = Completion(TOKENIZER, GenerateRequest(1, [5], SamplingParams(stop=("b",)), 0.0))
    assert not completion.take(TokenOutput(1, ids("hel")))
    assert (completion.has_text, completion.delta(), completion.delta()) == (True, Delta("hel", 3), Delta("", 0))
    assert completion.take(TokenOutput(1, ids("lobby"))), "the engine does not know of it"
    assert not completion.take(TokenOutput(1, ids("late"), "length"))
    assert (completion.finish_reason, completion.token_ids) == ("stop", ids("hellob"))
    assert completion.delta() == Delta("lo", 3)


def test_a_completion_continues_its_prompt():
    """For decoders that join tokens by what stands next to them."""
    tokenizer = word_piece()
    play, ing = (tokenizer.token_to_id(token) for token in ("play", "##ing"))
    completion = Completion(Tokenizer(tokenizer), GenerateRequest(1, [play], SamplingParams(), 0.0))
    completion.take(TokenOutput(1, [ing], "length"))
    assert completion.delta().text == "ing"


def test_a_completion_that_the_engine_ends_shows_what_was_held_back():
    completion = Completion(TOKENIZER, GenerateRequest(1, [5], SamplingParams(stop=("stop",)), 0.0))
    assert not completion.take(TokenOutput(1, ids("st"), "error", error=ErrorInfo("INTERNAL", "a bug")))
    assert completion.delta() == Delta("st", 2)
    assert (completion.finish_reason, completion.error) == ("error", ErrorInfo("INTERNAL", "a bug"))
