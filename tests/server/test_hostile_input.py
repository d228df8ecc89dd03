"""Whatever a client sends: it is told what is wrong, nobody else is harmed, and nothing stays behind.

Beside each of these requests a stream runs in the same model. It must go on as if nothing had happened; afterwards a
good request is answered, and no KV block is held.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from flashserve.sampling_params import PARAMETERS
from harness import Server, wait_until
from hostile_grammars import HOSTILE
from requests_helper import GrpcCall, Raw, call, generate, post, strings, wait_idle
from shared_servers import LETTERS, NULL_IDS, letters

MODEL = "paced"
PROMPT = [40, 41, 42]
GOOD = {"prompt_token_ids": str(PROMPT), "max_tokens": 5, "exclude_input_in_output": True}
MB = 2**20


class StreamBeside:
    """A stream of up to ten seconds, read by a thread of its own."""

    def __init__(self, server: Server) -> None:
        sampling = {"prompt_token_ids": PROMPT, "max_tokens": 2000, "ignore_eos": True}
        self._call = GrpcCall(server, {"stream": True, "sampling_parameters": sampling}, model=MODEL)
        self._texts: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        self.assert_goes_on()

    def _read(self) -> None:
        try:
            for reply in self._call:
                self._texts.append(reply.text)
        except Exception:  # cancelled by `close`
            return

    def assert_goes_on(self) -> None:
        """Wait for its next token; fails if it does not come or is not the right one."""
        seen = len(self._texts)
        assert wait_until(lambda: len(self._texts) > seen, 5, poll_s=0.005), "the stream beside stands still"
        cycle = LETTERS + "\ufffd" * (len(NULL_IDS) - len(LETTERS))
        text = "".join(self._texts)
        assert (cycle[len(PROMPT) :] + cycle * 30).startswith(text)

    def close(self) -> None:
        self._call.cancel()
        self._thread.join(5)


@pytest.fixture(autouse=True)
def nobody_else_is_harmed(server: Server) -> Iterator[None]:
    beside = StreamBeside(server)
    yield
    assert generate(server, model=MODEL, **GOOD)["text_output"] == letters(3, 5)
    beside.assert_goes_on()
    beside.close()
    wait_idle(server, MODEL)


def refused(server: Server, *words: str, **body: Any) -> None:
    """The request is answered with INVALID_ARG and these words, whole and as a stream."""
    for verb in ("generate", "generate_stream"):
        response = post(server, {"text_input": "hello", **body}, model=MODEL, verb=verb)
        assert response.status_code == 400
        assert response.text.count("[code=INVALID_ARG]") == 1
        assert all(word in response.text for word in words), response.text
        assert len(response.text) < 700, "an error does not repeat what was sent"


# --- not a request at all ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not JSON",
        b"[]",
        b"null",
        b'{"text_input": "hello"',
        b'{"text_input": "hello"} and more',
        b'{"text_input": 5}',
        b'{"text_input": null}',
        b'{"text_input": {}}',
        b'{"text_input": []}',
        b'{"text_input": ["a", "b"]}',
        b'{"text_input": "a", "text_input": "b"}',
        b'{"text_input": "\\ud800"}',
        b'{"text_input": "hello", "stream": "yes"}',
        b'{"text_input": "hello", "max_tokens": "5"}',
        b'{"text_input": "hello", "max_tokens": [1, 2]}',
        b'{"text_input": "hello", "stop": ["a"]}',
        b'{"text_input": "hello", "temperature": null}',
        b'{"text_input": "hello", "temperature": 1e999}',
        b'{"text_input": ' + b"[" * 1000 + b"]" * 1000 + b"}",
        b'{"a":' * 100 + b"1" + b"}" * 100,
        b"\x00" * 1000,
        b"\xff" * MB,
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_a_body_that_triton_itself_refuses(server: Server, body: bytes) -> None:
    for verb in ("generate", "generate_stream"):
        response = post(server, body, model=MODEL, verb=verb)
        assert response.status_code in (400, 500)
        assert "error" in response.text


def test_a_body_that_ends_before_its_end(server: Server) -> None:
    host, port = server.http.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 5) as connection:
        path = f"/v2/models/{MODEL}/generate_stream"
        connection.sendall(f'POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{"text_in'.encode())


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"text_input": Raw(b"\1\0\0\0", "INT32")}, "'text_input' data-type is 'INT32'"),
        ({"text_input": "hello", "stream": "true"}, "'stream' data-type is 'BYTES'"),
        ({"text_input": "hello", "max_tokens": Raw(b"\0\0\x80\x3f", "FP32")}, "'max_tokens' data-type is 'FP32'"),
        ({"text_input": Raw(b"", shape=(0,))}, "'text_input'"),
        ({"text_input": strings(b"a", b"b")}, "'text_input'"),
        ({"text_input": Raw(strings(b"hello"), shape=(1, 1))}, "'text_input'"),
        ({"text_input": Raw(strings(b"hello"), shape=(-1,))}, "'text_input'"),
        ({"text_input": Raw(strings(b"hello"), shape=(2**40,))}, "'text_input'"),
        ({"text_input": Raw(b"\xff\xff\xff\xffabc")}, "'text_input'"),  # longer than what follows
        ({"text_input": Raw(b"\1\0\0\0abc")}, "'text_input'"),  # shorter
        ({"text_input": Raw(b"\1")}, "'text_input'"),
        ({"text_input": "hello", "stream": Raw(b"", "BOOL")}, "'stream'"),
        ({"text_input": "hello", "no_such_input": "x"}, "'no_such_input'"),
    ],
    ids=str,
)
def test_a_tensor_that_is_not_what_it_claims_to_be(server: Server, inputs: dict[str, Any], words: str) -> None:
    (reply,) = call(server, model=MODEL, **inputs)
    assert words in reply.error


# --- prompts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (b"", "text_input is empty"),
        (b"caf\xe9", "text_input is not valid UTF-8 at byte 3"),
        (b"\xed\xa0\x80", "text_input is not valid UTF-8 at byte 0"),  # a lone surrogate
        (b"\xf4\x90\x80\x80", "text_input is not valid UTF-8"),  # beyond Unicode
        (b"\xc0\x80", "text_input is not valid UTF-8"),  # a NUL in disguise
        (b"7" * 3000, "prompt has 3000 tokens, the model's context takes at most 2048"),
        (b"x" * (10 * MB), "text_input has 10485760 bytes"),
        ("\U0001f600".encode() * (2 * MB), "text_input has 8388608 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_prompts_that_cannot_be(server: Server, prompt: bytes, words: str) -> None:
    (reply,) = call(server, model=MODEL, text_input=prompt)
    assert reply.error.startswith(words)
    assert reply.error.endswith("[code=INVALID_ARG]")
    http = post(server, b'{"text_input": "%s"}' % prompt, model=MODEL)
    assert (http.status_code, http.json()["error"]) == (400, reply.error)


@pytest.mark.parametrize("prompt", ["\0", "a\0b", "\ufeffx", "\u202eabc", "<|endoftext|>", " " * 500, "\r\n", "\x7f"])
def test_odd_prompts_are_prompts(server: Server, prompt: str) -> None:
    body = {"text_input": prompt, "max_tokens": 1, "skip_special_tokens": False}
    assert generate(server, model=MODEL, **body)["text_output"][:-1] == prompt
    replies = call(server, model=MODEL, stream=True, text_input=prompt, max_tokens=1)
    assert len("".join(reply.text for reply in replies)) == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"chat_request": '{"messages": []}'}, "text_input and chat_request are given"),
        ({"tokenize_request": '{"text": "a"}'}, "text_input and tokenize_request are given"),
        ({"prompt_token_ids": "[1]"}, "text_input and prompt_token_ids are given"),
        ({"embedding_request": "{}", "chat_request": "{}"}, "text_input and chat_request and embedding_request are"),
    ],
)
def test_several_prompts_at_once(server: Server, body: dict[str, str], words: str) -> None:
    refused(server, "exactly one of", words, **body)


def test_no_prompt_at_all(server: Server) -> None:
    response = post(server, {"max_tokens": 5}, model=MODEL)
    assert response.status_code == 400
    assert "exactly one of" in response.text
    assert "none is given" in response.text


@pytest.mark.parametrize(
    "ids",
    ["[]", "[-1]", "[512]", "[1.5]", "[true]", '["1"]', "[[1]]", "{}", "1", "x", "[1", f"[{2**63}]", "[" + "9" * 5000],
)
def test_token_ids_that_are_none(server: Server, ids: str) -> None:
    response = post(server, {"prompt_token_ids": ids}, model=MODEL)
    assert response.status_code == 400
    assert "prompt_token_ids" in response.text
    assert "[code=INVALID_ARG]" in response.text


def test_a_million_token_ids(server: Server) -> None:
    ids = json.dumps({"prompt_token_ids": [40] * 1_000_000})
    (reply,) = call(server, model=MODEL, sampling_parameters=ids)
    assert "prompt has 1000000 tokens, the model's context takes at most 2048" in reply.error


# --- sampling parameters -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "sampling_parameters is not valid JSON"),
        ("{", "sampling_parameters is not valid JSON"),
        ("[]", "sampling_parameters must be a JSON object, not a list"),
        ("null", "sampling_parameters must be a JSON object, not null"),
        ('"max_tokens"', "sampling_parameters must be a JSON object, not a string"),
        ('{"top_k": 1, "top_k": 1}', "sampling_parameters has the key 'top_k' twice"),
        ('{"temperature": NaN}', "sampling_parameters holds NaN"),
        ('{"temperature": -Infinity}', "sampling_parameters holds -Infinity"),
        ('{"max_tokens": ' + "9" * 5000 + "}", "sampling_parameters is not valid JSON"),
        ('{"stop": ' + "[" * 100_000 + "]" * 100_000 + "}", "sampling_parameters is nested too deeply"),
        ('{"stop": ' * 100_000, "sampling_parameters"),
        ('{"stream": true}', "stream is an input of its own"),
        ('{"text_input": "x"}', "text_input is an input of its own"),
        ("\ufeff{}", "sampling_parameters is not valid JSON"),
    ],
    ids=lambda value: value[:40],
)
def test_sampling_parameters_that_are_no_object(server: Server, given: str, words: str) -> None:
    refused(server, words, sampling_parameters=given)


WRONG_VALUES: dict[str, list[Any]] = {
    "temperature": [-0.1, 1001, 10**400, 1e300, "nan", "inf", "1_0", " ", True, [], {"a": 1}, "٣"],
    "top_p": [0, -1, 1.01, 2**64],
    "min_p": [-0.1, 1.1],
    "top_k": [-2, 1.5, 2**31, 2**63, True],
    "seed": [2**63, -(2**63) - 1, 1.5, "9223372036854775808", 1e19, True, "0x10"],
    "max_tokens": [0, -1, 2**31, 2**64, 10**100, 1.5, "many", "1e400", False, [5]],
    "min_tokens": [-1, 2**40, "-1"],
    "stop": [[""], [5], [None], {"a": "b"}, 5, ["x" * 1025], ["x"] * 10_000, ["\ud800"], [["x"]]],
    "stop_token_ids": [[-1], [512], [2**63], [1.0], [True], ["1"], 5, "[1", [1] * 300],
    "ignore_eos": [1, "yes", [], 0.0],
    "include_stop_str_in_output": [2, "no", {}],
    "skip_special_tokens": ["si", 5, []],
    "logprobs": [-1, 21, 0.5, "all", True],
    "prompt_logprobs": [-1, 21, "x", []],
    "prompt_token_ids": [[], [-1], [512], [1.5], "x", 5],
    "timeout": [-1, 2**63, "soon"],
    "traceparent": ["\n", 5, []],
    "truncate_prompt_tokens": [0, -2, 2**31],
    "priority": [2**31, -(2**31) - 1, 0.5, "urgent"],
    "timeout_ms": [0, -1, 2**31, 0.5],
    "cache_salt": [5, "x" * 257, "\n", "\0", "\ud800"],
    "id": ["x" * 257, "a\nb", "\x1b[2J", [], True],
    "n": [129, 0, "0", True],
    "presence_penalty": [2.1, -3, "nan", True, []],
    "frequency_penalty": [-2.01, 10**400, "x"],
    "repetition_penalty": [0, -1, 1001, "inf", False],
    "logit_bias": [{"5": 101}, {"512": 1}, {"-1": 1}, {"x": 1}, {"5": None}, [5], 5, {"5": [1]}],
    "bad_words": [[""], [5], ["   "], ["x" * 257], ["x"] * 300, ["\ud800"], 5],
    "dry_multiplier": [-1, 101],
    "dry_base": [0.5, 5],
    "dry_allowed_length": [0, 51, 1.5],
    "dry_sequence_breakers": [[""], [5], ["x"] * 100],
    "xtc_probability": [-0.1, 1.1],
    "xtc_threshold": [-0.1, 1.1],
    "structured_outputs": [{"json": 5}, {}, 5, "x", {"regex": "a", "json": {}}, {"xml": "a"}, {"choice": []}],
    "allowed_token_ids": [[], [-1], [512], 5, ["1"]],
    "temprature": [1],
    "__class__": ["x"],
    "x" * 1_000_000: [1],
    "": [1],
    "\ud800": [1],
}


def test_every_parameter_has_wrong_values() -> None:
    assert set(PARAMETERS) <= set(WRONG_VALUES)


@pytest.mark.parametrize("name", WRONG_VALUES, ids=lambda name: ascii(name[:30]))
def test_values_out_of_range_or_of_the_wrong_type(server: Server, name: str) -> None:
    """Each is refused by the parameter's name."""
    shown = ascii(name[:20])[1:-1].replace("\\", "\\\\")
    for value in WRONG_VALUES[name]:
        refused(server, shown, sampling_parameters=json.dumps({name: value}))


def test_the_largest_and_smallest_values_are_values(server: Server) -> None:
    """Through the sampler of a model that really computes."""
    extremes = [
        {"temperature": 1000},
        {"temperature": 1e-300},
        {"temperature": 1.1e-5},
        {"top_p": 5e-324},
        {"min_p": 1, "temperature": 1000},
        {"top_k": 2**31 - 1, "top_p": 1, "min_p": 0},
        {"seed": -(2**63), "priority": -(2**31), "timeout_ms": 2**31 - 1},
        {"max_tokens": 3, "stop": ["x" * 1024] * 64, "stop_token_ids": [511] * 256},
        {"truncate_prompt_tokens": 2**31 - 1, "cache_salt": "x" * 256},
        {"repetition_penalty": 1e-300, "presence_penalty": -2, "frequency_penalty": 2},
        {"repetition_penalty": 1000, "logit_bias": {str(token): -100 for token in range(512)}},
        {"bad_words": ["x" * 256] * 256, "dry_multiplier": 100, "dry_base": 4, "dry_sequence_breakers": []},
        {"xtc_probability": 1, "xtc_threshold": 0, "temperature": 1000},
    ]
    for sampling in extremes:
        body = {"max_tokens": 3, "exclude_input_in_output": True, "sampling_parameters": json.dumps(sampling)}
        assert "text_output" in generate(server, model="llama", text_input="hello", **body)
    wait_idle(server, "llama")


def test_contradictions_between_the_places_of_a_parameter(server: Server) -> None:
    refused(server, "max_tokens is given twice", max_tokens=5, sampling_parameters='{"max_tokens": 6}')
    refused(server, "seed is given twice", seed=5, sampling_parameters='{"seed": 6}')
    refused(server, "unknown parameter 'triton_x'", triton_x=1)
    refused(server, "seed must be an integer", seed=2**63)
    (reply,) = call(server, model=MODEL, text_input="hello", stream=True, parameters={"stream": False})
    assert "stream is given twice" in reply.error
    (reply,) = call(server, model=MODEL, text_input="hello", request_id="one", parameters={"id": "another"})
    assert "id is given twice" in reply.error
    (reply,) = call(server, model=MODEL, text_input="hello", parameters={"chat_request": "{}"})
    assert "chat_request must be an input tensor" in reply.error
    (reply,) = call(server, model=MODEL, text_input="hello", parameters={"temperature": float("nan")})
    assert reply.error.endswith("[code=INVALID_ARG]")


# --- requests in JSON --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_json", "words"),
    [
        ("hello", "chat_request is not valid JSON"),
        ("[]", "chat_request must be a JSON object"),
        ("{}", "chat_request.messages must be a list of at least one message"),
        ('{"messages": "hi"}', "chat_request.messages must be"),
        ('{"messages": [5]}', "chat_request.messages[0] must be"),
        ('{"messages": [{"content": "hi"}]}', "chat_request.messages[0].role"),
        ('{"messages": [{"role": "user"}]}', "chat_request.messages[0].content"),
        ('{"messages": [{"role": "user", "content": 5}]}', "chat_request.messages[0].content"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "content[0] is of type 'image_url'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "chat_request has a lone surrogate"),
        ('{"messages": [{"role": "u", "content": "x"}], "tools": [5]}', "chat_request.tools[0] must be"),
        ('{"messages": [{"role": "u", "content": "x"}], "model": "m"}', "unknown key 'model' in chat_request"),
        ('{"messages": [{"role": "u", "content": "x"}], "messages": []}', "chat_request has the key 'messages' twice"),
        ('{"messages": ' + "[" * 50_000 + "]" * 50_000 + "}", "chat_request is nested too deeply"),
        ('{"messages": [{"role": "u", "content": "%s"}]}' % ("x" * MB), "chat_request has 1048"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_chat_requests_that_are_none(server: Server, request_json: str, words: str) -> None:
    (reply,) = call(server, model=MODEL, chat_request=request_json)
    assert words in reply.error
    assert reply.error.endswith("[code=INVALID_ARG]")


@pytest.mark.parametrize(
    ("request_json", "words"),
    [
        ("{}", "tokenize_request needs exactly one of text, messages, token_ids"),
        ('{"text": 5}', "tokenize_request.text must be a string"),
        ('{"text": "a", "token_ids": []}', "tokenize_request needs exactly one of"),
        ('{"text": "a", "model": "m"}', "unknown key 'model' in tokenize_request"),
        ('{"token_ids": [512]}', "tokenize_request.token_ids: token id 512 is not in the model's range"),
        ('{"token_ids": "hello"}', "token_ids"),
        ('{"messages": []}', "tokenize_request.messages must be"),
        ('{"text": "\\udfff"}', "tokenize_request.text has a lone surrogate"),
        ('{"text": "%s"}' % ("x" * 5 * MB), "tokenize_request.text has 5242880 bytes"),
    ],
    ids=lambda value: value[:60],
)  # fmt: skip
def test_tokenize_requests_that_are_none(server: Server, request_json: str, words: str) -> None:
    (reply,) = call(server, model=MODEL, tokenize_request=request_json)
    assert words in reply.error
    assert reply.error.endswith("[code=INVALID_ARG]")


# --- forms of texts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
def test_a_form_that_no_text_can_have_or_nobody_can_compile(server: Server, name: str) -> None:
    refused(server, "structured_outputs", sampling_parameters=json.dumps({"structured_outputs": HOSTILE[name]}))
