"""Worker processes: started, asked, paused, and ended with everything they started."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.common.results import ROOT, one_line

QUIT_TIMEOUT_S = 30.0
KILL_TIMEOUT_S = 5.0


class WorkerError(Exception):
    """No answer; the text is the reason for the table."""


class EngineError(WorkerError):
    """The engine could not do what it was asked to."""


class WorkerGone(WorkerError):
    """The process ended, or did not answer in time and was killed."""


class Worker:
    """One engine's process, in a process group of its own.

    If this process ends without having ended its workers, killed even, a running one sees the end of its stdin. A
    paused one cannot; but its group, of this session still, is orphaned then, and the kernel sends the stopped members
    of such a group SIGHUP and SIGCONT.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path) -> None:
        self.log = log
        with log.open("wb") as sink:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sink,
                env=environment,
                cwd=ROOT,
                preexec_fn=os.setpgrp,  # process_group= came with Python 3.11
            )
        self._buffer = b""

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer to a request. Raises EngineError with the engine's own error, WorkerGone if none comes."""
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
            raise EngineError(one_line(answer["error"]))
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
        return WorkerGone(one_line(f"ended with status {self.process.returncode}: {lines[-1] if lines else ''}"))

    def pause(self) -> None:
        """Returns when it stands still: only a group that has stopped by then is ended with this process."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

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

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
