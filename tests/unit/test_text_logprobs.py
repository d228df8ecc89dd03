"""Tokens with their log-probabilities: texts that join, what a stop string cuts off, and JSON as vLLM writes it."""

from __future__ import annotations

import json
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.protocol import GenerateRequest, Logprobs, SamplingParams, TokenLogprob, TokenOutput
from flashserve.text.completion import Completion
from flashserve.text.logprobs import LOWEST, to_json
from flashserve.text.tokenizer import Tokenizer
from small_tokenizers import byte_level, metaspace, sentencepiece, word_piece

TOKENIZERS = [Tokenizer(make()) for make in (byte_level, sentencepiece, metaspace, word_piece)]
BYTES = TOKENIZERS[0]


def completion(tokenizer: Tokenizer = BYTES, prompt: list[int] | None = None, **params) -> Completion:
    own = SamplingParams(**{"logprobs": 1, "skip_special_tokens": False, **params})
    return Completion(tokenizer, GenerateRequest(1, prompt or [5, 6], own, arrival=0.0))


def output(token_ids: list[int], finish: str | None = None, top: tuple[int, ...] = ()) -> TokenOutput:
    found = [TokenLogprob(-0.5, 2, [(token, -0.25) for token in top]) for _ in token_ids]
    return TokenOutput(1, token_ids, finish, None, None, 0, Logprobs(found, []))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), tokenizer=st.sampled_from(TOKENIZERS))
def test_texts_of_tokens_join_to_the_text_whatever_was_looked_at_beside_them(data, tokenizer):
    size = len(tokenizer.special_token_ids) + 200
    ids = data.draw(st.lists(st.integers(0, size), min_size=1, max_size=30))
    sample, text, tokens = completion(tokenizer), "", []
    for index, token in enumerate(ids):
        end = "length" if index == len(ids) - 1 else None
        sample.take(output([token], end, tuple(data.draw(st.lists(st.integers(0, size), max_size=3)))))
        if end is None and data.draw(st.booleans()):
            continue
        delta = sample.delta()
        text += delta.text
        tokens += delta.scores
        assert len(delta.scores) == delta.num_tokens
    assert "".join(score.token.text for score in tokens) == text
    assert [score.token.token_id for score in tokens] == ids


def test_an_alternative_is_decoded_at_its_place():
    first, second = (byte_level().token_to_id(byte) for byte in "Ã©")  # the two bytes of "é" in GPT-2's alphabet
    (letter,) = BYTES.encode("a")
    sample = completion()
    sample.take(output([first], None, (letter,)))
    sample.take(output([letter], "length", (second, letter)))
    scores = sample.delta().scores
    assert [score.token.text for score in scores] == ["", "\ufffda"]
    assert [one.text for one in scores[1].top] == ["é", "\ufffda"]


def test_a_stop_string_cuts_tokens_and_their_scores_alike():
    ids = [token for char in "abcdef" for token in BYTES.encode(char)]
    sample = completion(stop=("d",))
    assert sample.take(output(ids))
    delta = sample.delta()
    assert (delta.text, delta.num_tokens, len(delta.scores)) == ("abc", 4, 4)
    assert delta.cumulative_logprob == sample.cumulative_logprob == -2.0


def test_json_is_vllms_and_has_no_infinity():
    sample = completion()
    found = [TokenLogprob(-math.inf, 9, [(5, math.nan), (7, -1.0)]), TokenLogprob(-1.0, 1, [(7, -1.0)])]
    sample.take(TokenOutput(1, [8, 7], "length", None, None, 0, Logprobs(found, [])))
    entries = json.loads(to_json(sample.delta().scores), parse_constant=None)
    assert [list(entry) for entry in entries] == [["8", "5", "7"], ["7"]]
    assert entries[0]["8"]["logprob"] == entries[0]["5"]["logprob"] == LOWEST
    assert [one["rank"] for one in entries[0].values()] == [9, 1, 2]
    assert set(entries[1]["7"]) == {"logprob", "rank", "decoded_token"}


def test_those_of_a_prompt_come_in_chunks_and_are_taken_once():
    prompt = BYTES.encode("née")
    sample = completion(prompt=prompt, logprobs=None, prompt_logprobs=0)
    for left, right in ((0, 1), (1, len(prompt) - 1)):
        assert sample.take_prompt_scores() is None
        chunk = [TokenLogprob(-1.0, 1, []) for _ in range(left, right)]
        sample.take(TokenOutput(1, [], None, None, None, 0, Logprobs([], chunk)))
    found = sample.take_prompt_scores()
    assert found is not None and found[0] is None and len(found) == len(prompt)
    assert "n" + "".join(score.token.text for score in found[1:] if score) == "née"
    assert sample.take_prompt_scores() is None
    assert completion(logprobs=None).take_prompt_scores() is None
