"""The streams of a load test against servers that send exactly what a case needs."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from loadtest.record import CANCELLED, CONNECTION, IMPATIENT, TIMEOUT, Record
from loadtest.streams import Ask, parse_target, stream_for

ASK = Ask("hello", 5, timeout_s=5.0)
Answer = Callable[[socket.socket, bytes], bool]
"""Answers one request; whether the connection stays open."""


@contextmanager
def serve(answer: Answer) -> Iterator[tuple[str, list[int]]]:
    """A server whose connections are answered one after the other; yields its address and a count of connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections = [0]

    def run() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections[0] += 1
            with connection, suppress(OSError):  # a client that left
                while (request := receive(connection)) is not None and answer(connection, request):
                    pass

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", connections
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def receive(connection: socket.socket) -> bytes | None:
    data = b""
    while b"\r\n\r\n" not in data:
        if not (piece := connection.recv(65536)):
            return None
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(value: object) -> bytes:
    return b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"


def delta(**values: object) -> bytes:
    return event({"choices": [{"index": 0, "delta": values}], "usage": None})


USAGE = event({"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 5}})


def refusal(status: int, error: dict[str, str]) -> bytes:
    body = json.dumps({"error": error}).encode()
    return b"HTTP/1.1 %d No\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def ask(address: str, path: str = "/v1", asked: Ask = ASK, times: int = 1) -> Record:
    stream = stream_for(parse_target(address + path), "m")
    try:
        for _ in range(times):
            record = stream.measure(asked)
    finally:
        stream.close()
    return record


def test_chat_chunks_are_stamped_when_they_arrive_and_counted_by_usage() -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        asked = json.loads(body)
        assert asked["messages"] == [{"role": "user", "content": "hello"}]
        assert asked["stream_options"] == {"include_usage": True}
        connection.sendall(HEAD + chunked(delta(role="assistant", content="")))
        time.sleep(0.1)
        connection.sendall(chunked(b": keep-alive\n\n"))
        time.sleep(0.1)
        first = chunked(delta(content="a"))
        connection.sendall(first[:20])  # a chunk in two packets counts when its end is there
        time.sleep(0.1)
        connection.sendall(first[20:])
        time.sleep(0.2)
        connection.sendall(chunked(delta(content="b") + delta(content="c"), delta(), USAGE, event(b"[DONE]")) + END)
        return True

    with serve(answer) as (address, _):
        record = ask(address)
    assert record.error is None, record.message
    assert record.ttft == pytest.approx(0.3, abs=0.05)
    assert [gap for gap, _ in record.gaps] == pytest.approx([0.2, 0.0], abs=0.05)
    assert (record.prompt_tokens, record.output_tokens) == (11, 5)
    assert record.tpot == pytest.approx(0.2 / 4, abs=0.02)


def test_completions_are_asked_for_by_their_path() -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        assert json.loads(body)["prompt"] == "hello"
        text = event({"choices": [{"text": "x"}]}) + USAGE + event(b"[DONE]")
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        return True

    with serve(answer) as (address, _):
        record = ask(address, "/v1/completions")
    assert (record.error, len(record.chunks), record.output_tokens) == (None, 1, 5)


def test_the_next_turn_of_a_chat_repeats_prompts_and_answers() -> None:
    bodies: list[dict[str, object]] = []

    def answer(connection: socket.socket, body: bytes) -> bool:
        bodies.append(json.loads(body))
        texts = delta(role="assistant", content=""), delta(reasoning="hm"), delta(content="Hi "), delta(content="you")
        connection.sendall(HEAD + chunked(*texts, USAGE, event(b"[DONE]")) + END)
        return True

    with serve(answer) as (address, _):
        first = ask(address)
        ask(address, asked=Ask("and?", 5, timeout_s=5.0, history=(("hello", first.answer),)))
    assert first.answer == "Hi you"
    assert bodies[1]["messages"] == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hi you"},
        {"role": "user", "content": "and?"},
    ]


def test_connections_are_used_again_and_replaced_when_the_server_closed_them() -> None:
    stay = iter([True, True, False, True])

    def answer(connection: socket.socket, body: bytes) -> bool:
        connection.sendall(HEAD + chunked(delta(content="a"), USAGE) + END)
        return next(stay)

    with serve(answer) as (address, connections):
        record = ask(address, times=4)
        assert record.error is None, record.message
        assert connections == [2]


@pytest.mark.parametrize(
    ("reply", "kind", "message"),
    [
        (refusal(429, {"code": "full", "message": "too many"}), "full", "too many"),
        (refusal(404, {"type": "not_found", "message": "no m"}), "not_found", "no m"),
        (b"HTTP/1.1 502 Bad\r\nContent-Length: 5\r\n\r\nsorry", "HTTP 502", "sorry"),
        (HEAD + chunked(event({"error": {"type": "server_error", "message": "boom"}})) + END, "server_error", "boom"),
        (HEAD + chunked(event(b"{nonsense")) + END, "INTERNAL", "nonsense"),
        (HEAD + chunked(delta(content="a")), CONNECTION, "ended within"),
        (HEAD + b"zz\r\n", CONNECTION, "zz"),
        (b"SSH-2.0\r\n\r\n", CONNECTION, "no HTTP"),
        (b"", CONNECTION, "ended within"),
    ],
)  # fmt: skip
def test_what_goes_wrong_has_a_kind_and_words(reply: bytes, kind: str, message: str) -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        connection.sendall(reply)
        return False

    with serve(answer) as (address, _):
        record = ask(address)
    assert record.error == kind
    assert message in record.message


def test_nobody_listens() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    listener.close()
    record = ask(f"http://127.0.0.1:{port}")
    assert record.error == CONNECTION
    assert f"127.0.0.1:{port}" in record.message


@pytest.mark.parametrize(("impatient", "kind"), [(False, TIMEOUT), (True, IMPATIENT)])
def test_a_request_that_takes_too_long_is_given_up(impatient: bool, kind: str) -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        connection.sendall(HEAD)
        for _ in range(20):
            connection.sendall(chunked(delta(content="a")))
            time.sleep(0.05)
        return False

    with serve(answer) as (address, _):
        record = ask(address, asked=Ask("x", 5, timeout_s=0.3, impatient=impatient))
    assert record.error == kind
    assert 0.25 < record.e2e < 0.5
    assert len(record.chunks) > 2


def test_a_client_that_leaves_closes_its_connection() -> None:
    closed = threading.Event()

    def answer(connection: socket.socket, body: bytes) -> bool:
        connection.sendall(HEAD)
        try:
            while True:
                connection.sendall(chunked(delta(content="a")))
                time.sleep(0.02)
        except OSError:
            closed.set()
        return False

    with serve(answer) as (address, _):
        record = ask(address, asked=Ask("x", 99, timeout_s=5, cancel_after_tokens=3))
        assert closed.wait(2)
    assert (record.error, len(record.chunks)) == (CANCELLED, 3)


def test_tritons_chunks_tell_their_tokens() -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        assert json.loads(body)["stream"] is True
        counts = [("a", 1), ("", 0), ("bc", 2), ("", 1)]
        events = [{"text_output": text, "num_output_tokens": count, "num_input_tokens": 7} for text, count in counts]
        connection.sendall(HEAD + chunked(*map(event, events)) + END)
        return True

    with serve(answer) as (address, _):
        record = ask(address, "")
    assert record.error is None, record.message
    assert [tokens for _, tokens in record.chunks] == [1, 2, 1]
    assert (record.prompt_tokens, record.output_tokens) == (7, 4)


def test_tritons_refusals_keep_their_code() -> None:
    def answer(connection: socket.socket, body: bytes) -> bool:
        text = event({"error": "queue is full [code=UNAVAILABLE retry_after_ms=850]"})
        connection.sendall(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
        return True

    with serve(answer) as (address, _):
        record = ask(address, "")
    assert (record.error, record.message) == ("UNAVAILABLE", "queue is full")
