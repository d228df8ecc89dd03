"""Log-probabilities through Triton: every combination of the outputs of the vLLM backend's own test."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from harness import Server
from requests_helper import Reply, call, call_one, generate, post, stream_sse

PROMPT = "In this example,"
NUM_TOKENS = 3
OUTPUTS = ("finish_reason", "cumulative_logprob", "logprobs", "num_input_tokens", "num_output_tokens")
COMBINATIONS = list(itertools.product((True, False), (None, 0, 2), *[(None, True, False)] * len(OUTPUTS)))
GREEDY: dict[str, Any] = {"temperature": "0", "top_p": "1", "max_tokens": NUM_TOKENS, "ignore_eos": True}
KINDS = {"finish_reason": "BYTES", "cumulative_logprob": "FP32", "logprobs": "BYTES", "num_input_tokens": "UINT32",
         "num_output_tokens": "UINT32", "text_output": "BYTES"}  # fmt: skip


def ask(server: Server, stream: bool, logprobs: int | None, flags: dict[str, bool | None], **more: Any) -> list[Reply]:
    sampling = {**GREEDY, **({} if logprobs is None else {"logprobs": logprobs}), **more}
    inputs = {f"return_{name}": flag for name, flag in flags.items() if flag is not None}
    replies = call(server, model="llama", text_input=PROMPT, stream=stream, sampling_parameters=sampling, **inputs)
    assert not any(reply.error for reply in replies), replies
    return [reply for reply in replies if reply.outputs]


def check(server: Server, combination: tuple[Any, ...]) -> None:
    stream, logprobs, *rest = combination
    flags = dict(zip(OUTPUTS, rest, strict=True))
    replies = ask(server, stream, logprobs, flags)
    named = {"text_output", *(name for name, flag in flags.items() if flag)}
    assert stream or len(replies) == 1
    total, tokens = 0.0, 0
    for reply in replies:
        assert reply.types == {name: KINDS[name] for name in named}
        assert set(map(tuple, reply.shapes.values())) == {(1,)}
        if flags["finish_reason"]:
            assert reply.outputs["finish_reason"] == ("length" if reply is replies[-1] else "None")
        if flags["cumulative_logprob"]:
            assert reply.outputs["cumulative_logprob"] < total
            total = reply.outputs["cumulative_logprob"]
        if flags["num_output_tokens"]:
            tokens += reply.outputs["num_output_tokens"]
        if flags["logprobs"]:
            check_logprobs(json.loads(reply.outputs["logprobs"]), reply, logprobs, "" if stream else PROMPT)
    assert not flags["num_output_tokens"] or tokens == NUM_TOKENS


def check_logprobs(found: Any, reply: Reply, logprobs: int | None, text: str) -> None:
    if logprobs is None:
        assert found is None
        return
    assert len(found) == reply.outputs.get("num_output_tokens", len(found)) >= 1
    for entry in found:
        assert len(entry) == max(1, logprobs)  # greedy: the chosen token is the most probable one
        assert [set(one) for one in entry.values()] == [{"logprob", "rank", "decoded_token"}] * len(entry)
        (best,) = [one for one in entry.values() if one["rank"] == 1]
        assert best["logprob"] == max(one["logprob"] for one in entry.values()) < 0
        text += best["decoded_token"]
    assert text == reply.text


def test_every_combination_of_outputs(server: Server) -> None:
    assert len(COMBINATIONS) == 1458
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda combination: check(server, combination), COMBINATIONS))


@pytest.mark.parametrize("stream", [False, True])
def test_the_sum_is_that_of_the_chosen_tokens(server: Server, stream: bool) -> None:
    flags: dict[str, bool | None] = {"logprobs": True, "cumulative_logprob": True}
    replies = ask(server, stream, 0, flags, temperature=1.2, seed=3, max_tokens=12)
    entries = [entry for reply in replies for entry in json.loads(reply.outputs["logprobs"])]
    assert len(entries) == 12
    values = [one["logprob"] for entry in entries for one in entry.values()]
    np.testing.assert_allclose(replies[-1].outputs["cumulative_logprob"], sum(values), rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_decoded_tokens_join_to_the_text_also_across_the_bytes_of_characters(server: Server, seed: int) -> None:
    """At this temperature most tokens of the model are single bytes, which seldom make characters."""
    flags: dict[str, bool | None] = {"logprobs": True}
    replies = ask(server, True, 0, flags, temperature=50, seed=seed, max_tokens=40, skip_special_tokens=False)
    entries = [entry for reply in replies for entry in json.loads(reply.outputs["logprobs"])]
    assert "".join(one["decoded_token"] for entry in entries for one in entry.values()) == "".join(
        reply.text for reply in replies
    )


def test_what_comes_after_a_stop_string_has_none(server: Server) -> None:
    whole = ask(server, False, 1, {"logprobs": True}, max_tokens=20)[0]
    text = whole.text.removeprefix(PROMPT)
    (cut,) = ask(
        server,
        False,
        1,
        {"logprobs": True, "num_output_tokens": True},
        max_tokens=20,
        stop=[text[len(text) // 2 :][:2]],
    )
    found = json.loads(cut.outputs["logprobs"])
    assert found == json.loads(whole.outputs["logprobs"])[: len(found)]
    assert len(found) == cut.outputs["num_output_tokens"] < 20


@pytest.mark.parametrize("stream", [False, True])
def test_those_of_the_prompt_come_once(server: Server, stream: bool) -> None:
    replies = ask(server, stream, None, {}, prompt_logprobs=2)
    given = [reply.outputs["prompt_logprobs"] for reply in replies if "prompt_logprobs" in reply.outputs]
    (found,) = map(json.loads, given)
    assert replies[0].shapes["prompt_logprobs"] == [1]
    ids = json.loads(generate(server, model="llama", tokenize_request=json.dumps({"text": PROMPT}))["text_output"])
    assert found[0] is None
    assert [next(iter(entry)) for entry in found[1:]] == [str(token) for token in ids["token_ids"][1:]]
    assert PROMPT.endswith("".join(next(iter(entry.values()))["decoded_token"] for entry in found[1:]))


def test_over_http(server: Server) -> None:
    body = {"model": "llama", "text_input": PROMPT, "temperature": 0, "max_tokens": 2, "logprobs": "1"}
    whole = generate(server, return_logprobs=True, return_cumulative_logprob=True, **body)
    assert len(json.loads(whole["logprobs"])) == 2 and whole["cumulative_logprob"] < 0
    events = stream_sse(server, return_logprobs=True, **body)
    assert [entry for event in events for entry in json.loads(event["logprobs"])] == json.loads(whole["logprobs"])


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [-1, 21, 1.5, True, "many"])
def test_a_wrong_number_is_named_with_its_range(server: Server, name: str, value: Any) -> None:
    answer = post(server, {"text_input": PROMPT, name: value}, model="llama")
    assert answer.status_code == 400
    assert f"{name} must be an integer in [0, 20], not {value!r}" in answer.text


def test_several_samples_have_lists_of_their_own(server: Server) -> None:
    body = {"text_input": PROMPT, "n": 2, "max_tokens": 4, "ignore_eos": True, "logprobs": 1, "seed": 5}
    answer = generate(server, model="llama", return_logprobs=True, return_cumulative_logprob=True, **body)
    assert len(answer["cumulative_logprob"]) == 2
    first, second = map(json.loads, answer["logprobs"])
    assert len(first) == len(second) == 4 and first != second
    assert call_one(server, model="letters", text_input="a", parameters={"logprobs": 1, "max_tokens": 1},
                    return_logprobs=True).outputs["logprobs"].count("rank") == 1  # fmt: skip
