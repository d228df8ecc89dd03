"""Keeps one engine process alive, and is the stub's way to talk to it.

One thread owns the process from start to end: it spawns, receives, notices the death, waits with back-off, spawns
again. It must live as long as the engine, whose parent-death signal is tied to the thread that spawned it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import flashserve
from flashserve.config import EngineConfig
from flashserve.errors import ConfigError, FlashserveError, InternalError, Unavailable
from flashserve.home import with_home
from flashserve.ipc.channel import Channel, ChannelClosed
from flashserve.memory import RETURNING
from flashserve.progress import Progress
from flashserve.protocol import EngineFailed, EngineMessage, EngineReady, StepOutputs, StubMessage

log = logging.getLogger(__name__)

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.2, 30.0
STABLE_AFTER_S = 60.0  # an engine that ran this long starts the back-off anew
LOADING_POLL_S, MAX_IDLE_S = 1.0, 60.0
STOP_TIMEOUT_S = 2.0  # the engine ends within a step of its socket's closing; then it is killed


class EngineListener(Protocol):
    """Called from the supervisor's thread; must return quickly and never raise."""

    def on_ready(self, ready: EngineReady) -> None: ...

    def on_outputs(self, message: StepOutputs) -> None: ...

    def on_dead(self, error: Unavailable) -> None:
        """The engine is gone with everything that was sent to it. A new one starts soon, unless it was stopped."""
        ...


class EngineSupervisor:
    """One engine process after another."""

    def __init__(self, config: EngineConfig, listener: EngineListener, max_idle_s: float = MAX_IDLE_S) -> None:
        """An engine that does not run for ``max_idle_s`` while it loads the model is ended."""
        self._config = config
        self._listener = listener
        self._max_idle_s = max_idle_s
        self._lock = threading.Lock()
        self._channel: Channel[EngineMessage] | None = None  # set while an engine is ready
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._first_start = threading.Event()
        self._start_error: FlashserveError | None = None
        self._ready_message: EngineReady | None = None
        self._spawned = 0.0
        self._retry_at = 0.0
        self._load_seconds = 0.0
        self._owed_since: float | None = None
        self._end_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine-supervisor", daemon=True)

    def start(self) -> EngineReady:
        """Start the first engine and block until it is ready.

        Raises ConfigError if it cannot serve this configuration, InternalError if it died while starting. Loading
        has no time limit, as a large model on a slow disk takes minutes; but an engine that does not run is ended.
        """
        self._thread.start()
        self._first_start.wait()
        if self._ready_message is None:
            self.stop()
            raise self._start_error or InternalError("the engine was stopped while it started")
        return self._ready_message

    @property
    def ready(self) -> bool:
        return self._channel is not None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None else process.pid

    def send(self, message: StubMessage) -> None:
        """Hand a message to the engine. Raises Unavailable while there is none."""
        channel = self._channel
        if channel is None:
            raise self.unavailable("the engine is starting again after a failure")
        if self._owed_since is None:
            self._owed_since = time.monotonic()
        try:
            channel.send(message)
        except ChannelClosed as error:
            raise self.unavailable("the engine has just died") from error

    @property
    def silent_s(self) -> float:
        """For how long a ready engine has owed a word: it has requests, or was sent something, and each step of its
        sends one. 0 if it owes none."""
        since = self._owed_since
        return 0.0 if since is None or self._channel is None else time.monotonic() - since

    def restart(self, reason: str) -> None:
        """End a ready engine, so that another starts; its requests fail with ``reason``."""
        with self._lock:
            process = self._process if self._channel is not None else None
            if process is not None and self._end_reason is None:
                self._end_reason = reason
                process.kill()

    def unavailable(self, message: str) -> Unavailable:
        """An error whose retry-after covers the back-off and another loading like the last."""
        wait_s = max(0.0, self._retry_at - time.monotonic()) + self._load_seconds
        return Unavailable(message, retry_after_ms=int(wait_s * 1000))

    def stop(self) -> None:
        """End the engine and the thread, within a bound. Idempotent."""
        self._stopping.set()
        with self._lock:
            channel, process = self._channel, self._process
        if channel is not None:
            channel.shutdown()
        if process is not None:
            try:
                process.wait(STOP_TIMEOUT_S if channel is not None else 0)
            except subprocess.TimeoutExpired:
                process.kill()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(STOP_TIMEOUT_S)

    # --- the supervisor's thread --------------------------------------------------------------------------

    def _run(self) -> None:
        backoff = FIRST_BACKOFF_S
        while not self._stopping.is_set():
            self._spawned = time.monotonic()
            reason = self._live_once()
            if self._ready_message is None:  # the first start failed: the model does not load, nobody tries again
                self._start_error = self._start_error or InternalError(reason)
                self._first_start.set()
                return
            if self._stopping.is_set():
                self._listener.on_dead(Unavailable("the model is being unloaded", retry_after_ms=1000))
                return
            stable = time.monotonic() - self._spawned > STABLE_AFTER_S
            backoff = FIRST_BACKOFF_S if stable else min(backoff * 2, MAX_BACKOFF_S)
            self._retry_at = time.monotonic() + backoff
            log.error("%s; a new engine starts in %.1f s", reason, backoff)
            self._listener.on_dead(self.unavailable(reason))
            self._stopping.wait(backoff)

    def _live_once(self) -> str:
        """One engine's life. Returns why it ended."""
        ours, theirs = socket.socketpair()
        channel: Channel[EngineMessage] = Channel(ours, EngineMessage)
        try:
            with theirs:
                process = self._spawn(theirs)
        except (OSError, ConfigError) as error:  # no memory to fork, or no interpreter
            channel.close()
            return f"the engine process could not be started: {error}"
        with self._lock:
            self._process = process
            if self._stopping.is_set():
                process.kill()
        try:
            self._receive_until_ready(process, channel)
            while True:
                for message in channel.receive():
                    self._dispatch(message, channel)
        except ChannelClosed:
            pass  # the normal end of an engine's life, also when it was killed
        except Exception:
            log.exception("a message of the engine could not be understood: ending it")
        finally:
            with self._lock:
                self._channel = None
            channel.close()
        return self._reap(process)

    def _receive_until_ready(self, process: subprocess.Popen[bytes], channel: Channel[EngineMessage]) -> None:
        """A stopped process keeps its socket open and would be waited for without an end."""
        progress = Progress(process.pid, with_children=True)
        while self._channel is None:
            for message in channel.receive(LOADING_POLL_S):
                self._dispatch(message, channel)
            if progress.idle_s() >= self._max_idle_s:
                self._end_reason = f"did not run for {self._max_idle_s:.0f} s while it loaded the model and was ended"
                process.kill()

    def _dispatch(self, message: EngineMessage, channel: Channel[EngineMessage]) -> None:
        if isinstance(message, StepOutputs):
            has_work = message.stats.running or message.stats.waiting
            self._owed_since = time.monotonic() if has_work else None
            self._listener.on_outputs(message)
        elif isinstance(message, EngineReady):
            self._ready_message = message
            self._load_seconds = time.monotonic() - self._spawned
            self._owed_since = None
            with self._lock:
                self._channel = channel
            self._listener.on_ready(message)
            self._first_start.set()
        elif isinstance(message, EngineFailed):
            self._start_error = ConfigError(message.error.message)

    def _spawn(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        command = [python_executable(), "-m", "flashserve.engine", "--fd", str(theirs.fileno())]
        command += ["--parent", str(os.getpid()), "--config", json.dumps(asdict(self._config))]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], env=engine_environment(), stdin=subprocess.DEVNULL)

    def _reap(self, process: subprocess.Popen[bytes]) -> str:
        try:
            status = process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        reason, self._end_reason = self._end_reason, None
        if reason is not None:
            return f"the engine process {reason}"
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        hint = " (out of memory?)" if status == -signal.SIGKILL and self._ready_message is None else ""
        return f"the engine process {how}{hint}"


def python_executable() -> str:
    """This interpreter. Inside Triton's stub, an embedded one, ``sys.executable`` is empty or not Python."""
    candidates = [os.environ.get("FLASHSERVE_PYTHON"), sys.executable, str(Path(sys.exec_prefix, "bin", "python3"))]
    for candidate in candidates:
        if candidate and Path(candidate).name.startswith("python") and os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("python3")
    if found is None:
        raise ConfigError("no python3 to start the engine with: put one on PATH or set FLASHSERVE_PYTHON")
    return found


def engine_environment() -> dict[str, str]:
    """The stub's environment, with our packages importable: the stub finds them beside model.py, a child may not."""
    package_dir = Path(flashserve.__file__).resolve().parent.parent
    paths = [str(package_dir), str(package_dir.parent / "kernels"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    inherited = {name: value for name, value in with_home(os.environ).items() if RETURNING.get(name) != value}
    return {**inherited, "PYTHONPATH": os.pathsep.join(p for p in paths if p)}
