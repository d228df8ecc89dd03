"""Every kind of error as clients see it, over both protocols: its type, its words, and what came before it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from faults.faulty_backend import BREAKS_PARSER, BREAKS_STEP, BREAKS_TEXT, SECRET

from flashserve_client import Client, DeadlineExceeded, InternalError, InvalidRequest, NotFound, Unavailable
from harness import Server, wait_until
from null_models import null_model, write_null_model
from requests_helper import COUNTERS_WITHIN_S, GrpcCall, call, generate, post, wait_idle
from shared_servers import LETTERS, letters

PROMPT = [40, 41, 42]
STEP_S = 0.005
"""Of `paced` and `narrow`."""
DEADLINE_S = 0.25
"""Enough for some steps on a busy machine, not for more than the null device has letters."""
ENDLESS = {"max_tokens": 1000, "ignore_eos": True}


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, server: Server) -> Iterator[Client]:
    url = server.http if request.param == "http" else f"grpc://{server.grpc}"
    with Client(url, model="letters") as made:
        yield made


# --- INVALID_ARG -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": -1}, "temperature must be a number in [0, 1000], not -1"),
        ({"top_p": 0}, "top_p must be a number in (0, 1], not 0"),
        ({"max_tokens": 0}, "max_tokens must be an integer in [1, 2^31-1], not 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens must be in [0, max_tokens]; it is 9 of 8"),
        ({"stop": [""]}, "stop must be a string or a list of at most 64 strings"),
        ({"stop_token_ids": [512]}, "stop_token_ids: token id 512 is not in the model's range [0, 511]"),
        ({"temprature": 1}, "unknown parameter 'temprature'; did you mean temperature?"),
        ({"max_new_tokens": 5}, "unknown parameter 'max_new_tokens'; did you mean max_tokens?"),
        ({"lora_name": "mine"}, "lora_name='mine' is not supported"),
        ({"logprobs": 21}, "logprobs must be an integer in [0, 20], not 21"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_parameter_is_named_with_what_it_takes(
    client: Client, parameters: dict[str, Any], words: str, stream: bool
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        list(client.stream(PROMPT, **parameters)) if stream else client.generate(PROMPT, **parameters)
    assert caught.value.message.startswith(words)
    assert caught.value.code == "INVALID_ARG"


def test_a_prompt_longer_than_the_context_is_told_both_lengths(client: Client) -> None:
    with pytest.raises(InvalidRequest, match="prompt has 2048 tokens, the model's context takes at most 2048"):
        client.generate([40] * 2048)
    assert client.generate([40] * 2047, max_tokens=5).completion_tokens == 1


def test_malformed_json_is_told_where(server: Server) -> None:
    body = {"text_input": "hello", "sampling_parameters": '{"max_tokens": 5'}
    for verb in ("generate", "generate_stream"):
        response = post(server, body, verb=verb)
        assert response.status_code == 400
        assert "sampling_parameters is not valid JSON: Expecting ',' delimiter" in response.text
        assert "[code=INVALID_ARG]" in response.text


# --- NOT_FOUND ---------------------------------------------------------------------------------------------


def test_a_model_that_does_not_exist(client: Client) -> None:
    with pytest.raises(NotFound, match="nowhere"):
        client.generate(PROMPT, model="nowhere")


# --- UNAVAILABLE -------------------------------------------------------------------------------------------


@pytest.fixture
def full_queue(server: Server) -> Iterator[list[GrpcCall]]:
    """`narrow` with one request running, for seconds, and as many waiting as may."""
    calls = [hold(server)]
    next(calls[0])
    calls += [hold(server) for _ in range(2)]
    assert wait_until(lambda: server.metric("vllm:num_requests_waiting", model="narrow") == 2, 5)
    yield calls
    for one in calls:
        one.cancel()
    wait_idle(server, "narrow")


def hold(server: Server) -> GrpcCall:
    inputs = {"stream": True, "sampling_parameters": {"prompt_token_ids": PROMPT, **ENDLESS}}
    return GrpcCall(server, inputs, model="narrow")


def test_a_full_queue_says_when_to_come_back(client: Client, full_queue: list[GrpcCall]) -> None:
    for ask in (lambda: client.generate(PROMPT, model="narrow"), lambda: list(client.stream(PROMPT, model="narrow"))):
        with pytest.raises(Unavailable, match="the queue is full: 2 requests with 6 tokens wait") as caught:
            ask()
        assert caught.value.retry_after_ms is not None
        assert 100 <= caught.value.retry_after_ms <= 60_000


def test_a_client_that_comes_back_is_served(server: Server, full_queue: list[GrpcCall]) -> None:
    time.sleep(COUNTERS_WITHIN_S)
    refusals = refused(server)
    with Client(f"grpc://{server.grpc}", model="narrow", retries=100) as patient, ThreadPoolExecutor(1) as thread:
        answer = thread.submit(patient.generate, PROMPT, max_tokens=3)
        assert wait_until(lambda: refused(server) > refusals, 5)
        for one in full_queue:
            one.cancel()
        assert answer.result(30).text == letters(3, 3)


def refused(server: Server) -> float:
    """How many requests `narrow` has refused because of its full queue."""
    return server.metric("flashserve:request_errors_total", model="narrow", code="UNAVAILABLE")


# --- CANCELLED, reason deadline ----------------------------------------------------------------------------


def test_a_stream_past_its_deadline_delivers_what_there_is_first(client: Client) -> None:
    stream = client.stream(PROMPT, model="paced", timeout_s=DEADLINE_S, **ENDLESS)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        list(stream)
    assert time.monotonic() - started < 2
    assert (caught.value.code, caught.value.reason) == ("CANCELLED", "deadline")
    partial = caught.value.partial
    assert partial is not None
    assert 1 <= partial.completion_tokens <= DEADLINE_S / STEP_S
    assert partial.text == letters(3, partial.completion_tokens)


def test_an_answer_past_its_deadline_is_an_error_only(client: Client) -> None:
    with pytest.raises(DeadlineExceeded):
        client.generate(PROMPT, model="paced", timeout_s=0.05, **ENDLESS)


def test_a_deadline_also_ends_a_request_that_waits(client: Client, full_queue: list[GrpcCall], server: Server) -> None:
    full_queue[-1].cancel()
    assert wait_until(lambda: server.metric("vllm:num_requests_waiting", model="narrow") == 1, 5)
    with pytest.raises(DeadlineExceeded) as caught:
        list(client.stream(PROMPT, model="narrow", timeout_s=0.1))
    assert caught.value.partial is not None
    assert caught.value.partial.completion_tokens == 0


def test_text_that_was_held_back_for_a_stop_string_is_delivered_too(client: Client) -> None:
    stop = letters(3, 50) + "!"  # begins with all of the text
    with pytest.raises(DeadlineExceeded) as caught:
        list(client.stream(PROMPT, model="paced", timeout_s=DEADLINE_S, stop=stop, **ENDLESS))
    partial = caught.value.partial
    assert partial is not None
    assert partial.completion_tokens >= 1
    assert partial.text == letters(3, partial.completion_tokens)


def test_tritons_own_timeout_is_a_deadline_in_microseconds(server: Server) -> None:
    ids = {"sampling_parameters": {"prompt_token_ids": PROMPT, **ENDLESS}}
    *_, over_grpc = call(server, model="paced", parameters={"timeout": 50_000}, stream=True, **ids)
    assert over_grpc.error.endswith("[code=CANCELLED reason=deadline]")
    http = post(server, {"prompt_token_ids": str(PROMPT), "timeout": 50_000, **ENDLESS}, model="paced")
    assert http.status_code == 400
    assert http.json()["error"] == "the request's deadline has passed [code=CANCELLED reason=deadline]"


def test_the_shorter_of_two_deadlines_counts(server: Server) -> None:
    body = {"prompt_token_ids": str(PROMPT), "timeout": 50_000, "timeout_ms": 60_000, **ENDLESS}
    assert "reason=deadline" in post(server, body, model="paced").text
    assert "reason=deadline" in post(server, {**body, "timeout": 60_000_000, "timeout_ms": 50}, model="paced").text


# --- the code on the wire ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "sampling", "status"),
    [
        ("letters", {"max_tokens": 0}, grpc.StatusCode.INVALID_ARGUMENT),
        ("paced", {"timeout_ms": 20, **ENDLESS}, grpc.StatusCode.CANCELLED),
    ],
)
def test_grpc_streams_that_ask_for_statuses_get_them(
    server: Server, model: str, sampling: dict[str, Any], status: grpc.StatusCode
) -> None:
    inputs = {"sampling_parameters": {"prompt_token_ids": PROMPT, **sampling}}
    with pytest.raises(grpc.RpcError) as caught:
        list(GrpcCall(server, inputs, model=model, metadata={"triton_grpc_error": "true"}))
    assert caught.value.code() is status
    assert re.search(r"\[code=[A-Z_]+( reason=deadline)?\]$", caught.value.details())


# --- INTERNAL ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose parser, text layer and engine raise for certain prompts."""
    folder = tmp_path_factory.mktemp("faulty")
    source = Path(__file__).parent / "faults"
    python = folder / "python-with-faults"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{source / "faulty_engine.py"}" "$@"\n')
    python.chmod(0o755)
    server = Server(
        {"letters": null_model(write_null_model(folder / "null"), step_ms=5)},
        arguments=["--backend-module", "faulty_backend"],
        python_path=[source],
        env={"FLASHSERVE_PYTHON": str(python)},
    )
    with server:
        yield server


@pytest.mark.parametrize("fault", [BREAKS_PARSER, BREAKS_TEXT, BREAKS_STEP])
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_bug_is_logged_and_not_told(faulty: Server, fault: int, protocol: str) -> None:
    url = faulty.http if protocol == "http" else f"grpc://{faulty.grpc}"
    with Client(url, model="letters") as client:
        for ask in (client.generate, lambda prompt, **more: list(client.stream(prompt, **more))):
            request_id = f"meets-a-bug-{uuid4()}"
            with pytest.raises(InternalError) as caught:
                ask([40, fault], request_id=request_id, max_tokens=5)
            assert caught.value.code == "INTERNAL"
            for told in ("/", "secret", "Traceback", "RuntimeError", ".py", "line "):
                assert told not in caught.value.message
            # Not the reason's own line: of lines that are equal the launcher shows ten a second.
            assert wait_until(lambda: request_id in faulty.log, 5)  # noqa: B023 - called at once
            assert client.generate(PROMPT, max_tokens=5).text == letters(3, 5)
    assert SECRET in faulty.log
    wait_idle(faulty, "letters")


@pytest.mark.parametrize("fault", [BREAKS_PARSER, BREAKS_TEXT, BREAKS_STEP])
def test_the_log_names_the_request_that_met_a_bug(faulty: Server, fault: int) -> None:
    with Client(faulty.http, model="letters") as client, pytest.raises(InternalError):
        client.generate([40, fault], request_id=f"culprit-{fault}", max_tokens=5)
    assert wait_until(lambda: f"culprit-{fault}" in faulty.log, 5)


@pytest.mark.parametrize("fault", [BREAKS_PARSER, BREAKS_TEXT])
def test_a_bug_in_one_request_leaves_the_others_alone(faulty: Server, fault: int) -> None:
    inputs = {"stream": True, "sampling_parameters": {"prompt_token_ids": PROMPT, "max_tokens": 40}}
    other = GrpcCall(faulty, inputs)
    first = next(other)
    with Client(faulty.http, model="letters") as client, pytest.raises(InternalError):
        client.generate([40, fault], max_tokens=5)
    assert first.text + "".join(reply.text for reply in other) == LETTERS[3:43]


def test_a_step_that_failed_leaves_the_engine_alive(faulty: Server) -> None:
    """Its requests share their fate, since their KV cannot be trusted; the engine does not."""
    for _ in range(4):  # three in a row would end the engine
        with Client(faulty.http, model="letters") as client, pytest.raises(InternalError):
            client.generate([40, BREAKS_STEP], max_tokens=5)
        assert generate(faulty, prompt_token_ids=str(PROMPT), max_tokens=2, exclude_input_in_output=True)[
            "text_output"
        ] == letters(3, 2)
    time.sleep(COUNTERS_WITHIN_S)
    assert faulty.metric("flashserve:engine_restarts_total") == 0
