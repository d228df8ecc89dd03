"""The gateway as a child of the launcher: started when the models are ready, started anew when it dies, ended."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass

from flashserve.launcher.console import Console
from flashserve.launcher.errors import LauncherError
from flashserve.launcher.ports import Endpoints

# What it imports beside what serving needs; looked for, not imported.
NEEDED = (
    *("flashserve_gateway", "fastapi", "uvicorn", "uvloop", "httptools", "openai", "orjson", "prometheus_client"),
    "python_multipart",
)
BACKOFF_S = (0.5, 2.0, 5.0, 15.0, 60.0)
START_S = 10.0  # one that ends sooner has served nobody
STABLE_AFTER_S = 60.0  # one that ran for so long has overcome what was wrong
END_TIMEOUT_S = 1.0  # beyond the time that tritonserver took to end; its own grace is five seconds


def gateway_lacks() -> list[str]:
    """The modules that it needs and that are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


@dataclass(frozen=True)
class GatewayOptions:
    """The gateway's own options that `flashserve serve` passes on, each with ``--gateway-`` before its name; None: the
    gateway's default. It alone knows what they mean, and checks them."""

    keys: str | None = None
    redis: str | None = None
    cache_answers: str | None = None
    data_dir: str | None = None
    queue_wait: str | None = None

    @property
    def arguments(self) -> list[str]:
        """As the gateway reads them."""
        given = {f"--{name.replace('_', '-')}": value for name, value in asdict(self).items() if value is not None}
        return [f"{option}={value}" for option, value in given.items()]


class GatewayChild:
    """Keeps one gateway alive, from a thread that reads what it says."""

    def __init__(self, endpoints: Endpoints, options: GatewayOptions, console: Console) -> None:
        """Raises LauncherError for options that cannot be used."""
        self._command = [
            *(sys.executable, "-m", "flashserve_gateway", "--end-with", str(os.getpid())),
            *("--triton", f"{endpoints.local_host}:{endpoints.grpc}"),
            *("--triton-metrics", endpoints.metrics_address),
            *("--host", endpoints.host, "--port", str(endpoints.gateway)),
            *options.arguments,
        ]
        if options.arguments:
            self._check()
        self._console = console
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        # The kernel ends the child with the thread that started it, so this one must live as long as the launcher.
        self._thread = threading.Thread(target=self._keep_alive, name="gateway", daemon=True)

    def start(self) -> None:
        """Start it, unless that was done."""
        if self._thread.ident is None and not self._ending.is_set():
            self._thread.start()

    def ask_to_end(self) -> None:
        """SIGTERM; it lets its streams end."""
        self._ending.set()
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None:
                self._process.terminate()

    def wait(self) -> None:
        """Until it has ended; what has not by then is killed."""
        if not self._thread.is_alive():
            return
        self._thread.join(END_TIMEOUT_S)
        with self._lock, contextlib.suppress(OSError):
            if self._process is not None:
                self._process.kill()
        self._thread.join(END_TIMEOUT_S)

    def _check(self) -> None:
        """Lets the gateway itself look at its options and keys: now, not when models of minutes are loaded."""
        found = subprocess.run([*self._command, "--check"], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if found.returncode:
            message, _, advice = found.stderr.strip().rpartition("flashserve gateway: error: ")[2].partition("\n  → ")
            # Of an option that is wrong by itself argparse says the name, which is longer here.
            option, _, words = message.removeprefix("argument ").partition(": ")
            is_named = option.startswith("--")
            words = f"{option.replace('--', '--gateway-')}: {words}" if is_named else f"--gateway-keys: {message}"
            raise LauncherError(words, advice or "flashserve gateway --help")

    def _keep_alive(self) -> None:
        failures = futile = 0
        while not self._ending.is_set():
            started = time.monotonic()
            reason = self._run()
            if self._ending.is_set():
                return
            ran_s = time.monotonic() - started
            failures = 1 if ran_s > STABLE_AFTER_S else failures + 1
            futile = 0 if ran_s > START_S else futile + 1
            gives_up = futile >= len(BACKOFF_S)
            words, advice = f"the gateway {reason}: it is started anew", ""
            if gives_up:
                words = f"the gateway {reason}, {futile} times in a row: it is given up"
                advice = "its lines above say why; then start flashserve serve anew"
            with contextlib.suppress(OSError):
                self._console.fail(words, advice)
            if gives_up:
                return
            self._ending.wait(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1])

    def _run(self) -> str:
        """One life of a gateway; returns how it ended."""
        with self._lock:
            if self._ending.is_set():
                return ""
            try:
                self._process = process = self._popen()
            except OSError as error:
                return f"cannot be started: {error}"
        assert process.stdout is not None
        for line in process.stdout:
            with contextlib.suppress(OSError):  # of the launcher's own output; the gateway's must still be read
                self._console.show_log(line.rstrip("\n"))
        return f"ended by itself with code {process.wait()}"

    def _popen(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self._command,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal reaches the launcher only
            text=True,
            errors="replace",
        )
