"""Whether a grammar can be compiled, found out where it can do no harm.

llguidance's own limits do not bound its compiler of schemas: unions nested in each other take three times as long with
each level, 1 s with six, before there are too many symbols. So a grammar is first compiled in a child of a small
helper process, with little memory and time; what it does ends with the child, however that ends. The helper holds the
tokenizer and forks, which takes 2 ms.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from flashserve.engine.grammar.source import compile_grammar, make_tokenizer

JUDGE_S = 1.0
JUDGE_BYTES = 256 << 20
_ANSWER_S = 30.0  # the first answer comes after the tokenizer was read
_BEGUN, _OK = b"+", b"ok"
"""What a child says first, and of a grammar that can be compiled."""


class Judge:
    """Owns the helper, started at the first question and again if it died. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer_json: str,
        vocab_size: int,
        eos_token_ids: list[int],
        seconds: float = JUDGE_S,
        memory: int = JUDGE_BYTES,
    ) -> None:
        """seconds (of a processor, in at most twice the time), memory (bytes, beyond the helper's own): what compiling
        one grammar may take."""
        self._setup = json.dumps([seconds, memory, tokenizer_json, vocab_size, eos_token_ids]).encode()
        self._most = f"{seconds:g} s and {memory >> 20} MiB"
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def refusal(self, source: str) -> str | None:
        """Why a grammar cannot be had, or None if it can. Raises OSError if no helper can be started."""
        answer = self._answer(source) or self._answer(source)  # again, by another helper
        if not answer:
            raise OSError("the helper process for grammars ends before it answers")
        verdict = answer.removeprefix(_BEGUN)
        if not verdict:
            return f"it cannot be compiled within {self._most}"
        return None if verdict == _OK else verdict.decode()

    def _answer(self, source: str) -> bytes:
        """What a child said; nothing if the helper died before it began, or does not run, and is ended for that."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                helper = self._ask(theirs)
            ours.settimeout(_ANSWER_S)
            answer = b""
            with contextlib.suppress(OSError):  # the child, or the helper, is gone
                ours.sendall(source.encode())
                ours.shutdown(socket.SHUT_WR)
                while piece := ours.recv(1 << 16):
                    answer += piece
        if not answer:
            with self._lock:
                if self._process is helper:  # nobody has started another one meanwhile
                    self._end()
        return answer

    def close(self) -> None:
        """End the helper. Idempotent."""
        with self._lock:
            self._closed = True
            self._end()

    def _ask(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        """Hand the helper an end of a question's own connection. Returns the helper."""
        with self._lock:
            for is_last in (False, True):
                if self._closed:
                    raise OSError("the engine is ending")
                if self._process is None or self._process.poll() is not None:
                    self._start()
                assert self._control is not None and self._process is not None
                try:
                    socket.send_fds(self._control, [b"?"], [theirs.fileno()])
                    return self._process
                except OSError:
                    if is_last:
                        raise
                    self._end()
        raise AssertionError("the second try returns or raises")

    def _start(self) -> None:
        self._end()
        self._control, theirs = socket.socketpair()
        # A file, not a pipe: nobody waits until a helper reads it.
        with theirs, os.fdopen(os.memfd_create("grammar-judge"), "w+b") as setup:
            setup.write(self._setup)
            setup.seek(0)
            command = [sys.executable, "-m", "flashserve.engine.grammar.judge", str(theirs.fileno())]
            # Modules are found where this process finds them.
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            self._process = subprocess.Popen(command, stdin=setup, pass_fds=[theirs.fileno()], env=environment)

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._control = self._process = None


def main() -> None:
    """The helper: ends when the engine closes its end of the control connection."""
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the engine decides when to end
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    os.nice(5)  # requests that run come first
    control = socket.socket(fileno=int(sys.argv[1]))
    seconds, memory, *setup = json.load(sys.stdin)
    tokenizer = make_tokenizer(*setup)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with socket.socket(fileno=descriptors[0]) as connection:
            if os.fork() == 0:
                control.close()
                _limit(seconds, memory)
                connection.sendall(_BEGUN)
                source = b"".join(iter(lambda: connection.recv(1 << 16), b"")).decode()
                _, error = compile_grammar(tokenizer, source)
                connection.sendall(error.encode() or _OK)
                os._exit(0)


def _limit(seconds: float, memory: int) -> None:
    """Of this process: what passes a limit ends it."""
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a word about memory that could not be had
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 2 * seconds)  # where others have the processors, too


if __name__ == "__main__":
    main()
