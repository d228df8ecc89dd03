"""What is generated and where it ends, through a real tritonserver: ends, stop strings, seeds, and always text."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from flashserve_client import AsyncClient
from harness import Server
from requests_helper import call, generate, post, stream_sse, text_of, wait_idle
from shared_servers import EOS_LETTER, LETTERS, letters

HELLO, HELLO_TOKENS = "hello", 3
TO_THE_END = LETTERS[HELLO_TOKENS : LETTERS.index(EOS_LETTER)]  # IJKL...abc
CONTEXT = 2048
OUTPUT_ONLY = {
    "text_input": HELLO,
    "exclude_input_in_output": True,
    "return_finish_reason": True,
    "return_num_output_tokens": True,
}


def answer(server: Server, model: str = "letters", **parameters: Any) -> tuple[str, str, int]:
    """Text, finish reason and number of tokens; asked for whole and as a stream, which must agree."""
    whole = generate(server, model=model, **{**OUTPUT_ONLY, **parameters})
    deltas = stream_sse(server, model=model, **{**OUTPUT_ONLY, **parameters})
    result = (whole["text_output"], whole["finish_reason"], whole["num_output_tokens"])
    assert (text_of(deltas), deltas[-1]["finish_reason"], sum(d["num_output_tokens"] for d in deltas)) == result
    return result


# --- where it ends -----------------------------------------------------------------------------------------


def test_the_end_of_sequence_token_ends_a_text_and_is_not_part_of_it(server: Server) -> None:
    assert answer(server, max_tokens=99) == (TO_THE_END, "stop", len(TO_THE_END) + 1)
    assert answer(server, include_stop_str_in_output=True, max_tokens=99)[0] == TO_THE_END + EOS_LETTER


def test_max_tokens_ends_a_text(server: Server) -> None:
    assert answer(server, max_tokens=1) == ("I", "length", 1)
    assert answer(server, max_tokens=len(TO_THE_END)) == (TO_THE_END, "length", len(TO_THE_END))
    assert answer(server, max_tokens=len(TO_THE_END) + 1)[1] == "stop"


def test_ignore_eos_goes_on(server: Server) -> None:
    text, reason, tokens = answer(server, ignore_eos=True, max_tokens=40)
    assert (text, reason, tokens) == (letters(HELLO_TOKENS, 40), "length", 40)


def test_a_text_without_max_tokens_gets_16_and_the_context_is_the_most(server: Server) -> None:
    assert answer(server) == (letters(HELLO_TOKENS, 16), "length", 16)
    result = generate(server, ignore_eos=True, **OUTPUT_ONLY, max_tokens=100_000)
    assert (result["finish_reason"], result["num_output_tokens"]) == ("length", CONTEXT - HELLO_TOKENS)


def test_a_chat_without_max_tokens_goes_on_to_its_end(server: Server) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    ask = {key: value for key, value in OUTPUT_ONLY.items() if key != "text_input"}
    result = generate(server, ignore_eos=True, return_num_input_tokens=True, **ask, chat_request=chat)
    assert result["finish_reason"] == "length"
    assert result["num_input_tokens"] + result["num_output_tokens"] == CONTEXT


def test_stop_token_ids_end_a_text(server: Server) -> None:
    # Ids 47 and 50 are "M" and "P"; ignore_eos is about the end-of-sequence token alone.
    assert answer(server, stop_token_ids="[50, 47]") == ("IJKL", "stop", 5)
    assert answer(server, stop_token_ids="[47]", ignore_eos=True) == ("IJKL", "stop", 5)
    assert answer(server, stop_token_ids="[47]", include_stop_str_in_output=True) == ("IJKLM", "stop", 5)


def test_min_tokens_puts_every_end_off(server: Server) -> None:
    assert answer(server, min_tokens=30, max_tokens=35) == (letters(HELLO_TOKENS, 35), "length", 35)
    assert answer(server, min_tokens=5, stop_token_ids="[47]", max_tokens=9)[1:] == ("length", 9)
    assert answer(server, min_tokens=4, stop_token_ids="[47]", max_tokens=9)[1:] == ("stop", 5)
    assert answer(server, min_tokens=8, stop="LM", max_tokens=12) == (letters(HELLO_TOKENS, 12), "length", 12)


def test_min_tokens_rules_end_tokens_out_of_the_choice(server: Server) -> None:
    """A model that would choose a stop token now has to choose another one, not to go on after it."""
    greedy = {"model": "llama", "text_input": "a b c", "temperature": 0, "max_tokens": 6}
    first = answer(server, **greedy)[0][0]
    (token_id,) = token_ids(server, first)
    assert answer(server, **greedy, stop_token_ids=f"[{token_id}]") == ("", "stop", 1)
    text, _, tokens = answer(server, **greedy, stop_token_ids=f"[{token_id}]", min_tokens=5)
    assert tokens >= 5
    assert not text.startswith(first)


def token_ids(server: Server, text: str) -> list[int]:
    answered = generate(server, tokenize_request=json.dumps({"text": text}))
    return json.loads(answered["text_output"])["token_ids"]


# --- stop strings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "text", "with_stop"),
    [
        ("L", "IJK", "IJKL"),
        ("KLM", "IJ", "IJKLM"),  # three tokens
        ('["ZZ", "NO", "MN"]', "IJKL", "IJKLMN"),  # the one that ends first
        ('["N", "KLMN"]', "IJ", "IJKLMN"),  # of those that end together the longest
        ('["[", "[]"]', "IJKLMNOPQRSTUVWXYZ", "IJKLMNOPQRSTUVWXYZ["),
        ("IJKL", "", "IJKL"),  # nothing is left
    ],
)
def test_stop_strings_across_tokens(server: Server, stop: str, text: str, with_stop: str) -> None:
    assert answer(server, stop=stop, max_tokens=99) == (text, "stop", len(with_stop))
    assert answer(server, stop=stop, include_stop_str_in_output="true", max_tokens=99) == (
        with_stop,
        "stop",
        len(with_stop),
    )


def test_a_stop_string_that_is_not_completed_is_text(server: Server) -> None:
    assert answer(server, stop="KLX", max_tokens=4) == ("IJKL", "length", 4)
    assert answer(server, stop="abcd", max_tokens=99) == (TO_THE_END, "stop", len(TO_THE_END) + 1)


def test_a_stop_string_in_the_prompt_does_not_count(server: Server) -> None:
    assert answer(server, stop=HELLO, max_tokens=3) == ("IJK", "length", 3)


def test_no_chunk_shows_a_part_of_a_stop_string(server: Server) -> None:
    replies = call(server, model="paced", text_input=HELLO, stream=True, sampling_parameters={"stop": ["LMNOP"]})
    shown = [reply.text for reply in replies]
    assert "".join(shown) == "IJK"
    assert len(shown) > 1, "5 ms per step leave time to send each token by itself"


def test_a_stop_string_cuts_computed_text_at_any_character(server: Server) -> None:
    ask = {"model": "llama", "text_input": "once upon a time", "temperature": 0, "max_tokens": 60}
    text, _, tokens = answer(server, **ask)
    for at in range(3, 12):
        stop = text[at : at + 4]
        cut, reason, counted = answer(server, **ask, sampling_parameters=json.dumps({"stop": [stop]}))
        assert (cut, reason) == (text[: text.index(stop)], "stop")
        assert counted < tokens


# --- seeds -------------------------------------------------------------------------------------------------


async def test_a_seed_gives_the_same_text_alone_and_in_a_batch(server: Server) -> None:
    """float32: the noise does not depend on the batch, and the logits hardly."""
    ask = {"temperature": 1.0, "top_p": 0.95, "max_tokens": 30}
    async with AsyncClient(f"grpc://{server.grpc}", model="llama") as client:
        alone = [(await client.generate("seeded", seed=seed, **ask)).text for seed in range(3)]
        others = [client.generate("noise " * n, **{**ask, "max_tokens": 20 + n}) for n in range(1, 9)]
        together = await asyncio.gather(*(client.generate("seeded", seed=s, **ask) for s in range(3)), *others)
    assert [result.text for result in together[:3]] == alone
    assert len(set(alone)) == 3, "seeds matter"


def test_without_a_seed_texts_differ(server: Server) -> None:
    texts = {generate(server, model="llama", text_input="unseeded", max_tokens=20)["text_output"] for _ in range(3)}
    assert len(texts) == 3


def seeded(server: Server, seed: int) -> str:
    sampling = json.dumps({"seed": str(seed), "max_tokens": 30, "ignore_eos": True})
    return str(generate(server, model="llama", text_input="seeded", sampling_parameters=sampling)["text_output"])


def test_a_seed_may_be_any_64_bit_integer(server: Server) -> None:
    for seed in (0, -2, 2**63 - 1, -(2**63)):
        assert seeded(server, seed) == seeded(server, seed)


def test_a_seed_of_minus_one_is_none(server: Server) -> None:
    """As in vLLM: some clients cannot leave it out. 30 random tokens of this model never come twice."""
    assert len({seeded(server, -1) for _ in range(3)}) == 3


# --- always text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_every_chunk_of_random_bytes_is_valid_utf8(server: Server, seed: int) -> None:
    """Tokens of single bytes in random order: characters come in pieces, and pieces that never become one."""
    ask = {"text_input": "any bytes", "exclude_input_in_output": True, "max_tokens": 300}
    chosen = {"seed": seed, "temperature": 1.5, "ignore_eos": True}
    whole = generate(server, model="llama", **ask, **chosen)["text_output"]
    assert "\ufffd" in whole, "some bytes form no character"
    assert any(ord(c) > 0x7F and c != "\ufffd" for c in whole), "some form one across tokens"
    assert text_of(stream_sse(server, model="llama", **ask, **chosen)) == whole
    replies = call(server, model="llama", stream=True, sampling_parameters=chosen, **ask)
    assert "".join(reply.text for reply in replies) == whole


def test_each_stray_byte_is_one_replacement_character(server: Server) -> None:
    prompt = str([40] * len(LETTERS))  # the null device goes on with bytes that begin no character
    ask = {"prompt_token_ids": prompt, "max_tokens": 26, "exclude_input_in_output": True}
    assert generate(server, **ask)["text_output"] == "\ufffd" * 23 + "FGH"
    assert text_of(stream_sse(server, model="paced", **ask)) == "\ufffd" * 23 + "FGH"


# --- several samples of one prompt -------------------------------------------------------------------------


def test_samples_are_those_of_the_next_seeds(server: Server) -> None:
    ask = {**OUTPUT_ONLY, "text_input": "seeded", "ignore_eos": True, "max_tokens": 30}
    alone = [generate(server, model="llama", **ask, seed=seed)["text_output"] for seed in (5, 6, 7)]
    together = generate(server, model="llama", **ask, seed=5, n=3)
    assert together["text_output"] == alone
    assert (together["finish_reason"], together["num_output_tokens"]) == (["length"] * 3, [30] * 3)
    events = stream_sse(server, model="llama", **ask, seed=5, n=3)
    assert ["".join(column) for column in zip(*(event["text_output"] for event in events), strict=True)] == alone
    assert events[-1]["finish_reason"] == ["length"] * 3
    wait_idle(server, "llama")


def test_a_stop_string_ends_the_sample_that_has_it(server: Server) -> None:
    ask = {**OUTPUT_ONLY, "text_input": "seeded", "ignore_eos": True, "max_tokens": 30, "seed": 5, "n": 3}
    whole = generate(server, model="llama", **ask)["text_output"]
    stop = whole[1][10:14]
    assert stop not in whole[0] + whole[2]
    stopped = generate(server, model="llama", **ask, sampling_parameters=json.dumps({"stop": [stop]}))
    assert stopped["text_output"] == [whole[0], whole[1][: whole[1].index(stop)], whole[2]]
    assert stopped["finish_reason"] == ["length", "stop", "length"]
    wait_idle(server, "llama")


def test_samples_that_could_never_run_together_are_refused(server: Server) -> None:
    response = post(server, {"text_input": HELLO, "n": 33, "max_tokens": 1}, model="llama")
    assert response.status_code == 400
    assert "n=33 samples of up to 4 tokens do not fit: at most 32 do [code=INVALID_ARG]" in response.text
