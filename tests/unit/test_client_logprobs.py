"""What the client makes of the server's log-probabilities."""

import json

import pytest

from flashserve_client.logprobs import Candidate, prompt_from_json, tokens_from_json

ENTRY = {
    "5": {"logprob": -2.0, "rank": 7, "decoded_token": "é"},
    "9": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
}


def test_the_chosen_token_comes_first_and_the_candidates_by_rank():
    (one,) = tokens_from_json(json.dumps([ENTRY]))
    assert one.token == Candidate(5, "é", -2.0, 7)
    assert [candidate.rank for candidate in one.candidates] == [1, 7]
    assert tokens_from_json("null") == tokens_from_json("[]") == ()
    assert prompt_from_json(json.dumps([None, ENTRY])) == (None, one)


@pytest.mark.parametrize("text", ["[5]", "[{}]", '[{"x": {}}]', '[{"5": {"logprob": 1}}]', "{", '[{"5": 3}]'])
def test_anything_else_is_an_error(text):
    with pytest.raises(ValueError):
        tokens_from_json(text)
