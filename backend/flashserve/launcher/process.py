"""The tritonserver process: its command line, environment and log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from flashserve.home import with_home
from flashserve.launcher.discover import TritonInstall, find_libpython
from flashserve.launcher.log_flood import FloodLimit
from flashserve.launcher.ports import Endpoints
from flashserve.launcher.reaper import ENDING_FILE, RUN_VARIABLE
from flashserve.launcher.triton_arguments import CONTROL_MODE, EXPLICIT, LOAD_MODEL, TritonArguments
from flashserve.launcher.workspace import Workspace, package_folders
from flashserve.load_notes import NOTES_VARIABLE
from flashserve.memory import RETURNING
from flashserve.stub_processes import ENDING_VARIABLE

HTTP_VARIABLE = "FLASHSERVE_TRITON_HTTP"
KEPT_LINES = 400
# Triton on a machine without a GPU says these at every start.
CPU_NOISE = re.compile(r"pinned memory pool|CudaDriverHelper|DCGM unable|initialize NVML")
LOADING = re.compile(r'"?loading: (?P<name>[^":]+):\d+"?$')
LOADED = re.compile(r"successfully loaded '(?P<name>[^']+)'")
FAILED = re.compile(r"failed to load '(?P<name>[^']+)' version \d+: (?P<reason>.*)")
INFO_LINE = re.compile(r"^I\d{4} [\d:.]+ \d+ (?P<file>\S+):\d+\]")


def command(
    install: TritonInstall,
    workspace: Workspace,
    repositories: Sequence[str],
    endpoints: Endpoints,
    arguments: TritonArguments,
) -> list[str]:
    """Tritonserver's command line."""
    return [
        str(install.server),
        f"--backend-directory={workspace.backends}",
        *(f"--model-repository={repository}" for repository in repositories),
        f"{CONTROL_MODE}={EXPLICIT}",
        # With the models loaded before the HTTP endpoint opens, Triton's health is true from the first moment.
        *(f"{LOAD_MODEL}={name}" for name in arguments.load),
        # The name is that of the runtime, also for backends that are built on it.
        f"--backend-config=python,shm-region-prefix-name={workspace.run_id}-",
        f"--http-address={endpoints.host}",
        f"--grpc-address={endpoints.host}",
        f"--metrics-address={endpoints.host}",
        f"--http-port={endpoints.http}",
        f"--grpc-port={endpoints.grpc}",
        f"--metrics-port={endpoints.metrics}",
        *arguments.others,
    ]


def environment(install: TritonInstall, workspace: Workspace, endpoints: Endpoints) -> dict[str, str]:
    """The environment of tritonserver, its stubs and their engines. Raises ConfigError if a home has to be made for
    them and cannot."""
    env = with_home(os.environ)
    libpython = find_libpython()
    libraries = [str(libpython.parent)] if libpython else []
    libraries += [str(path) for path in install.library_paths]
    env["LD_LIBRARY_PATH"] = _joined(libraries, env.get("LD_LIBRARY_PATH"))
    # The stub takes the first python3 on PATH; not resolved, as it is a link inside a virtual environment.
    env["PATH"] = _joined([str(workspace.programs), str(Path(sys.executable).parent)], env.get("PATH"))
    env["PYTHONPATH"] = _joined(package_folders(), env.get("PYTHONPATH"))
    env[HTTP_VARIABLE] = endpoints.http_address
    env[RUN_VARIABLE] = workspace.run_id
    env[ENDING_VARIABLE] = str(workspace.folder / ENDING_FILE)
    env[NOTES_VARIABLE] = str(workspace.load_notes)
    for name, value in RETURNING.items():
        env.setdefault(name, value)
    env["PYTHONUNBUFFERED"] = "1"
    return env


def _joined(first: Sequence[str], rest: str | None) -> str:
    return ":".join([*first, *filter(None, (rest or "").split(":"))])


class ServerProcess:
    """A running tritonserver in a session of its own, with a thread that reads its log."""

    def __init__(self, command: Sequence[str], env: dict[str, str], show: Callable[[str], None], verbose: bool) -> None:
        self.load_states: dict[str, str] = {}
        """Per model: "loading", "ready", or the reason why loading failed. For people only: Triton and the stubs share
        the log without locking, so two of their lines may arrive as one and a name be missed."""
        self._show = show
        self._verbose = verbose
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._gpu = Path("/dev/nvidiactl").exists()
        self._popen = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Its own session: a Ctrl-C in the terminal reaches the launcher only.
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert self._popen.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self._popen.stdout,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Process id, which is also that of the process group."""
        return self._popen.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._popen.poll()

    def wait(self, timeout_s: float) -> None:
        """Collect the ended process and the rest of its log."""
        self._popen.wait(timeout_s)
        self._reader.join(timeout_s)

    def last_lines(self, count: int) -> list[str]:
        """The end of the log."""
        return list(self._lines)[-count:]

    # The reader thread adds names meanwhile, hence the lists.
    def failures(self) -> dict[str, str]:
        """Reasons by model, of those whose loading failed."""
        return {name: state for name, state in list(self.load_states.items()) if state not in ("loading", "ready")}

    def loading(self) -> list[str]:
        """Models that are being loaded."""
        return [name for name, state in list(self.load_states.items()) if state == "loading"]

    def ready(self) -> list[str]:
        """Models that have been loaded, sorted."""
        return sorted(name for name, state in list(self.load_states.items()) if state == "ready")

    def _read(self, stream: IO[str]) -> None:
        flood = FloodLimit()
        for line in stream:
            self._take(flood.admit(line.rstrip("\n")))
        self._take(flood.held())

    def _take(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._lines.append(line)
            self._note(line)
            if self._verbose or self._matters(line):
                try:
                    self._show(line)
                except Exception as error:  # without this thread the pipe fills, and everybody who logs waits for ever
                    self._lines.append(f"flashserve: this line could not be shown: {error!r}")

    def _note(self, line: str) -> None:
        if match := LOADING.search(line):
            self.load_states[match["name"]] = "loading"
        elif match := LOADED.search(line):
            self.load_states[match["name"]] = "ready"
        elif match := FAILED.search(line):
            self.load_states[match["name"]] = _reason(match["reason"])

    def _matters(self, line: str) -> bool:
        """Warnings, errors, and what models say; not what Triton says of itself."""
        if not line or line[0] in "+|" or line.startswith("Signal (") or (not self._gpu and CPU_NOISE.search(line)):
            return False
        info = INFO_LINE.match(line)
        return info is None or info["file"].endswith(".py")


def _reason(logged: str) -> str:
    """The words of a load error without quotes and traceback."""
    words = logged.rstrip('"').replace("\\n", "\n").replace('\\"', '"').replace("\\'", "'")
    return re.sub(r"^(Internal: )?(TritonModelException: )?", "", words.split("\n\nAt:")[0].strip())
