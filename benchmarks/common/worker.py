"""Worker processes: started, asked, paused, and ended with everything they started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common.results import ROOT

QUIT_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 5.0


class WorkerError(Exception):
    """The engine could not do what it was asked to; the text is the reason for the table."""


class WorkerGone(WorkerError):
    """So could not the process: it ended, or did not answer in time, and was killed."""


class Guard:
    """Ends the workers' groups if this process ends without having done so, killed even.

    A signal at the parent's death would not do: paused processes take none but SIGKILL, which would leave their
    children behind.
    """

    _PROGRAM = """
import os, signal, sys, time
groups = set()
for line in sys.stdin:
    (groups.add if line[0] == "+" else groups.discard)(int(line[1:]))
for number in (signal.SIGTERM, signal.SIGCONT, signal.SIGKILL):
    for group in groups:
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            pass
    time.sleep(5 if groups and number == signal.SIGCONT else 0)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self._PROGRAM], stdin=subprocess.PIPE, text=True, start_new_session=True
        )

    def watch(self, group: int) -> None:
        self._say(f"+{group}")

    def forget(self, group: int) -> None:
        self._say(f"-{group}")

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


class Worker:
    """One engine's process, in a process group of its own."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path, guard: Guard) -> None:
        self.log = log
        self._guard = guard
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment,
                cwd=ROOT,
                start_new_session=True,
            )
        guard.watch(self.process.pid)
        self._buffer = b""

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request. Raises WorkerError with the engine's own error, WorkerGone if none comes."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._read_line(time.monotonic() + timeout_s))
        except BrokenPipeError:
            raise self._gone() from None
        except TimeoutError:
            self.kill()
            raise WorkerGone(f"no answer to {request['op']!r} within {timeout_s:.0f} s") from None
        if "error" in answer:
            raise WorkerError(_one_line(answer["error"]))
        return answer

    def _read_line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            data = os.read(descriptor, 1 << 20)
            if not data:
                raise self._gone()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _gone(self) -> WorkerGone:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_TIMEOUT_S)
        self.kill()
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return WorkerGone(_one_line(f"ended with status {self.process.returncode}: {lines[-1] if lines else ''}"))

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """Let it end by itself, then end it."""
        if self.process.poll() is None:
            self.resume()
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.write(b'{"op": "quit"}\n')
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(QUIT_TIMEOUT_S)
        self.kill()

    def kill(self) -> None:
        """End the whole group, politely first: a server's launcher has children elsewhere to take along."""
        self.resume()
        if self.process.poll() is None:
            self._signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_TIMEOUT_S)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._guard.forget(self.process.pid)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def cpu_seconds(self) -> float:
        """CPU time that its processes have used so far, children in other sessions included."""
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.process.pid)
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    total += sum(each.cpu_times()[:2])
        return total


def _one_line(text: str) -> str:
    """The first 160 characters of what matters in an error."""
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
