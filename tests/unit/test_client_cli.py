"""`flashserve generate` and `flashserve chat`, against a small real server; Ctrl-C in a real terminal."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import io
import json
import os
import pty
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import flashserve_client
from client_peers import PEERS, Error, Peer, endless, peer_in_thread, say, until
from flashserve_client import cli

PROGRAM = (
    # A run in the background of a shell ignores Ctrl-C, and what it starts inherits that.
    "import argparse, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from flashserve_client.cli import add_commands\n"
    "parser = argparse.ArgumentParser()\nadd_commands(parser.add_subparsers())\n"
    "args = parser.parse_args()\nsys.exit(args.run(args))\n"
)


@pytest.fixture
def peer():
    with peer_in_thread("grpc") as peer:
        yield peer


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_commands(parser.add_subparsers())
    args = parser.parse_args(words)
    return args.run(args)


def start(*words: str, **options) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(flashserve_client.__file__).parents[1]), "TERM": "dumb"}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *words], env=env, **options)


# --- generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PEERS)
def test_generate_streams_to_standard_output(kind, capsys):
    with peer_in_thread(kind) as peer:
        assert run("generate", "hello", "--url", peer.url) == 0
    assert capsys.readouterr() == ("one two three\n", "")
    assert peer.asked[0].inputs["text_input"] == "hello"
    assert peer.asked[0].inputs["stream"] is True


def test_options_are_sampling_parameters(peer: Peer):
    options = "--max-tokens 5 --temperature 0 --top-p 0.9 --top-k 3 --seed 7 --stop a --stop b --priority 2 --timeout 9"
    more = ["--param", "min_p=0.1", "--param", "logit_bias={}", "--param", "lora_name=x=y"]
    assert run("generate", "hello", "--url", peer.url, *options.split(), *more) == 0
    assert peer.asked[0].sampling == {
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": 3,
        "seed": 7,
        "stop": ["a", "b"],
        "priority": 2,
        "timeout_ms": 9000,
        "min_p": 0.1,
        "logit_bias": {},
        "lora_name": "x=y",
    }


def test_the_prompt_may_come_from_standard_input(peer: Peer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert run("generate", "--url", peer.url) == 0
    assert peer.asked[0].inputs["text_input"] == "from a pipe\n"


def test_json_is_the_whole_result(peer: Peer, capsys):
    assert run("generate", "x", "--url", peer.url, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["completion_tokens"], result["finish_reason"]) == ("one two three", 3, "stop")
    assert result["timings"]["queue_ms"] == 1.5


def test_no_stream_asks_for_one_answer(peer: Peer, capsys):
    assert run("generate", "x", "--url", peer.url, "--no-stream", "--stats") == 0
    out, err = capsys.readouterr()
    assert out == "one two three\n"
    assert "stream" not in peer.asked[0].inputs
    assert "ms in all" in err


def test_stats_go_to_standard_error(peer: Peer, capsys):
    assert run("generate", "x", "--url", peer.url, "--stats") == 0
    err = capsys.readouterr().err
    for part in ("3 prompt tokens (2 cached)", "3 generated", "finish reason stop", "first token after", "tokens/s"):
        assert part in err


@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (["demo", "other"], "demo"),
        (["demo", "other", "smollm2"], "smollm2"),
        (["other"], "other"),
        (["off", "other"], "other"),
        ([], "smollm2"),
    ],
)
def test_the_model_need_not_be_named_if_there_is_one(peer: Peer, index, chosen):
    peer.index = [{"name": n, "version": "1", "state": "UNAVAILABLE" if n == "off" else "READY"} for n in index]
    assert run("generate", "x", "--url", peer.url) == 0
    assert peer.asked[0].model == chosen


def test_a_question_is_a_chat(peer: Peer):
    assert run("generate", "--chat", "Who?", "--url", peer.url) == 0
    assert json.loads(peer.asked[0].inputs["chat_request"])["messages"] == [{"role": "user", "content": "Who?"}]


def test_several_models_need_a_name(peer: Peer, capsys):
    peer.index = [{"name": name, "version": "1", "state": "READY"} for name in ("b", "a")]
    assert run("generate", "x", "--url", peer.url) == 2
    assert "choose one with --model (a, b)" in capsys.readouterr().err
    assert run("generate", "x", "--url", peer.url, "--model", "b") == 0


def test_no_server_says_how_to_start_one(capsys):
    assert run("generate", "x", "--url", "grpc://127.0.0.1:1") == 1
    assert "no server at grpc://127.0.0.1:1: start one with `flashserve serve`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        ("queue is full [code=UNAVAILABLE retry_after_ms=850]", 1, "queue is full: try again in 0.8 s"),
        ("top_p: (0, 1] [code=INVALID_ARG]", 2, "flashserve: top_p: (0, 1]\n"),
        ("a bug [code=INTERNAL]", 1, "flashserve: a bug\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(peer: Peer, capsys, message, code, words):
    async def fail(asked):
        yield Error(message)

    peer.script = fail
    assert run("generate", "x", "--url", peer.url) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--url", "localhost:8000", "'localhost:8000' is no server URL"),
        ("--param", "x", "'x' is not NAME=VALUE"),
        ("--param", "model=y", "model is no sampling parameter"),
    ],
)
def test_bad_options_are_refused(option, value, words, capsys):
    try:
        assert run("generate", "x", option, value) == 2
    except SystemExit as left:  # argparse's own way
        assert left.code == 2
    assert words in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_ends_the_request_quietly(peer: Peer):
    peer.script = endless
    process = start("generate", "x", "--url", peer.url, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(3) == b"xxx"
    process.stdout.close()
    assert process.wait(5) == 0
    assert process.stderr.read() == b""
    assert peer.asked[0].cancelled


def test_every_option_has_help():
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers()
    cli.add_commands(subparsers)
    for command in subparsers.choices.values():
        assert command.description
        for action in command._actions:
            assert action.help, action


# --- chat -------------------------------------------------------------------------------------------------------


def test_chat_keeps_the_conversation_until_reset(peer: Peer, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n/reset\nnew\n/exit\nnever\n"))
    assert run("chat", "--url", peer.url, "--system", "Be brief.") == 0
    conversations = [json.loads(asked.inputs["chat_request"])["messages"] for asked in peer.asked]
    system = {"role": "system", "content": "Be brief."}
    assert conversations == [
        [system, {"role": "user", "content": "hello"}],
        [
            system,
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "one two three"},
            {"role": "user", "content": "again"},
        ],
        [system, {"role": "user", "content": "new"}],
    ]
    assert capsys.readouterr().out == "one two three\n" * 3


def test_chat_through_a_pipe_ends_at_the_first_error(peer: Peer, monkeypatch, capsys):
    async def fail(asked):
        yield Error("no template [code=INVALID_ARG]")

    peer.script = fail
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nagain\n"))
    assert run("chat", "--url", peer.url) == 1
    assert len(peer.asked) == 1
    assert "no template" in capsys.readouterr().err


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self._master, slave = pty.openpty()
        self.process = start(*words, stdin=slave, stdout=slave, stderr=slave, preexec_fn=_own_terminal)
        os.close(slave)
        self.seen = ""

    def expect(self, text: str, timeout_s: float = 8) -> None:
        """Reads on until `text` comes."""
        deadline = time.monotonic() + timeout_s
        os.set_blocking(self._master, False)
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode()
            except (BlockingIOError, OSError):
                time.sleep(0.01)
        self.seen = self.seen.split(text, 1)[1]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _own_terminal() -> None:
    """Makes the pseudo-terminal the controlling one, so that Ctrl-C is a signal."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_ctrl_c_stops_the_answer_and_not_the_chat(peer: Peer):
    async def once(asked):
        last = json.loads(asked.inputs["chat_request"])["messages"][-1]["content"]
        if last == "long":
            async for item in endless(asked):
                yield item
        yield say("short answer", "stop")

    peer.script = once
    terminal = Terminal("chat", "--url", peer.url, "--stats")
    try:
        terminal.expect(">>> ")
        terminal.type("long\n")
        terminal.expect("xxxx")
        terminal.type("\x03")
        terminal.expect("(stopped)")
        terminal.expect(">>> ")
        assert until_over(peer), "the server was not told"
        terminal.type("\x03")
        terminal.expect("/exit or Ctrl-D leaves")
        terminal.expect(">>> ")
        terminal.type("short\n")
        terminal.expect("short answer")
        terminal.expect("1 generated")
        terminal.expect(">>> ")
        terminal.type("\x04")
        assert terminal.process.wait(5) == 0
    finally:
        terminal.close()
    kept = json.loads(peer.asked[1].inputs["chat_request"])["messages"]
    assert [message["role"] for message in kept] == ["user", "assistant", "user"]
    assert set(kept[1]["content"]) == {"x"}, "what was said before Ctrl-C is part of the conversation"


def test_ctrl_c_ends_generate(peer: Peer):
    peer.script = endless
    terminal = Terminal("generate", "x", "--url", peer.url)
    try:
        terminal.expect("xxxx")
        terminal.type("\x03")
        assert terminal.process.wait(5) == cli.INTERRUPTED
        assert until_over(peer)
    finally:
        terminal.close()
    assert "Traceback" not in terminal.seen


def until_over(peer: Peer) -> bool:
    return asyncio.run(until(lambda: peer.asked[0].cancelled and peer.asked[0].over.is_set()))


# --- several answers, and embeddings ----------------------------------------------------------------------------


@pytest.mark.parametrize("asks", [("-n", "2"), ("--param", "n=2")])
def test_several_answers_come_one_after_the_other(peer, capsys, asks):
    async def two(asked):
        yield say(["one", "two"], ["stop", "stop"], [1, 1])

    peer.script = two
    assert run("generate", "hello", "--url", peer.url, *asks) == 0
    assert capsys.readouterr().out == "--- 1 of 2\none\n--- 2 of 2\ntwo\n"
    assert peer.asked[0].sampling["n"] == 2
    assert "stream" not in peer.asked[0].inputs
    assert run("generate", "hello", "--url", peer.url, "--json", *asks) == 0
    samples = json.loads(capsys.readouterr().out)["completions"]
    assert [sample["text"] for sample in samples] == ["one", "two"]


def test_a_chat_has_one_answer(capsys):
    assert run("chat", "--param", "n=2") == 2
    assert "n: a chat goes on from one answer" in capsys.readouterr().err


def test_embed_prints_a_json_list(peer, capsys, monkeypatch):
    async def embedding(asked):
        yield say("[0.5, -1]", "stop", 0)

    peer.script = embedding
    options = ("--pooling", "mean", "--dimensions", "2", "--timeout", "3", "--priority", "1")
    assert run("embed", "hello", "--url", peer.url, "--model", "m", *options) == 0
    assert capsys.readouterr().out == "[0.5, -1]\n"
    asked = peer.asked[0]
    assert (asked.model, asked.sampling) == ("m", {"priority": 1, "timeout_ms": 3000})
    assert json.loads(asked.inputs["embedding_request"]) == {
        "input": "hello",
        "pooling_params": {"pooling": "mean", "dimensions": 2},
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run("embed", "--url", peer.url) == 0
    assert json.loads(peer.asked[1].inputs["embedding_request"])["input"] == "from a pipe"
