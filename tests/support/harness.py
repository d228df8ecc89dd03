"""A real server for tests: the launcher with its tritonserver, on free ports and in folders of its own.

    with Server({"demo": {"model": "/path/of/weights"}}) as server:
        httpx.post(f"{server.http}/v2/models/demo/generate", json={"text_input": "hello"})

`models` maps a model's name to its model.json; `config` adds lines to the config.pbtxt of all of them. Leaving the
block stops the server as Ctrl-C would and asserts that no process, shared memory or temporary file is left. A server
that has ended before without a test's waiting for it fails there too, with the end of its log.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from flashserve.launcher.ports import free_port
from flashserve.stub_processes import Stub, list_stubs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(ROOT / name) for name in ("backend", "kernels", "client", "gateway")]
# Every process that a test's server starts carries it, whatever session or group it moves to.
TEST_VARIABLE = "FLASHSERVE_TEST"
# A test run that is killed takes its servers along. Not as preexec_fn: that forks, which breaks with gRPC's threads.
END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
READY_TIMEOUT_S = 60.0
# One client for all requests: 1 ms each, where httpx.get takes 30 to read certificates that nobody needs here.
HTTP = httpx.Client(trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0))
# The launcher's promise is ten seconds from the signal on.
STOP_TIMEOUT_S = 10.0


class Server:
    """One launcher and what it starts.

    Attributes: `http` ("http://127.0.0.1:PORT"), `grpc` ("127.0.0.1:PORT"), `metrics` (URL of /metrics), `gateway`
    ("http://127.0.0.1:PORT" if it was asked for), `repository` (the generated one; `add_model` writes to it),
    `launcher` (the Popen), `folder` (private; holds log and TMPDIR).
    """

    def __init__(
        self,
        models: Mapping[str, Mapping[str, Any]],
        *,
        config: str = "",
        arguments: Sequence[str] = (),
        triton_arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        python_path: Sequence[Path | str] = (),
        ready_timeout_s: float = READY_TIMEOUT_S,
        ready_pattern: str = "^ready in ",
        gateway: bool = False,
        parent: Path | None = None,
    ) -> None:
        """``parent``: where its own folder is made, default the system's temporary one."""
        self.test_id = uuid.uuid4().hex
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="fs-test-", dir=parent))
        self.repository = self.folder / "repository"
        self.repository.mkdir()
        for name, model_json in models.items():
            self.add_model(name, model_json, config)
        self._ports = [free_port() for _ in range(3)]
        self.http = f"http://127.0.0.1:{self._ports[0]}"
        self.grpc = f"127.0.0.1:{self._ports[1]}"
        self.metrics = f"http://127.0.0.1:{self._ports[2]}/metrics"
        gateway_port = free_port()
        self.gateway = f"http://127.0.0.1:{gateway_port}"
        with_gateway = ["--gateway-port", str(gateway_port)] if gateway else ["--no-gateway"]
        self._arguments = [*with_gateway, *arguments, *(["--", *triton_arguments] if triton_arguments else [])]
        self._has_models = bool(models)
        self._env = dict(env or {})
        self._python_path = [*SOURCES, *map(str, python_path)]
        self._ready_timeout_s = ready_timeout_s
        self._ready_pattern = ready_pattern
        self._log_path = self.folder / "server.log"
        self.launcher: subprocess.Popen[bytes] | None = None

    def add_model(self, name: str, model_json: Mapping[str, Any], config: str = "") -> Path:
        """Write a repository entry; a running server loads it by `load(name)`. Returns its folder."""
        version = self.repository / name / "1"
        version.mkdir(parents=True, exist_ok=True)
        (version / "model.json").write_text(json.dumps(model_json))
        (version.parent / "config.pbtxt").write_text(f'backend: "flashserve"\n{config}\n')
        return version.parent

    def start(self, wait: bool = True) -> Server:
        """Start the launcher and, by default, wait until it says that everything is ready."""
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        http, grpc, metrics = map(str, self._ports)
        repository = ["--model-repository", str(self.repository)] if self._has_models else []
        command = [
            *(sys.executable, "-c", END_WITH_PARENT, "-m", "flashserve.cli", "serve", "--verbose", *repository),
            *("--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics, *self._arguments),
        ]
        env = {
            **os.environ,
            "TMPDIR": str(temporary),
            "XDG_DATA_HOME": str(self.folder / "data"),  # where a gateway keeps its files
            TEST_VARIABLE: self.test_id,
            "PYTHONPATH": ":".join([*self._python_path, *filter(None, [os.environ.get("PYTHONPATH")])]),
            **self._env,
        }
        with open(self._log_path, "ab") as log:
            self.launcher = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait for the launcher's "ready in"; fails at once with the log's end if the launcher ended."""
        self.wait_for_log(self._ready_pattern, self._ready_timeout_s)

    def wait_for_log(self, pattern: str, timeout_s: float) -> re.Match[str]:
        """Wait until a line matches; AssertionError with the log's end if none does in time."""
        compiled = re.compile(pattern, re.MULTILINE)
        found: list[re.Match[str]] = []

        def seen() -> bool:
            found.extend(filter(None, [compiled.search(self.log)]))
            return bool(found) or (self.launcher is not None and self.launcher.poll() is not None)

        wait_until(seen, timeout_s)
        assert found, f"no {pattern!r} in the log within {timeout_s:g} s:\n{self.stacks()}"
        return found[0]

    def stacks(self) -> str:
        """The log's end, with the stacks of stubs and engines and what tritonserver's threads wait for."""
        end = len(self.log)
        lines = []
        for pid, words in self.processes().items():
            lines.append(f"{pid}: {' '.join(words)}")
            if words[0].endswith("/tritonserver"):
                lines += [f"  {thread.name}: {_waits(thread)}" for thread in Path(f"/proc/{pid}/task").iterdir()]
            elif "python_backend_stub" in words[0] or "flashserve.engine" in words:
                os.kill(pid, signal.SIGUSR1)
                time.sleep(0.2)  # one after the other: the log is shared
        return "\n".join([self.log[:end][-4000:], *lines, self.log[end:]])

    @property
    def log(self) -> str:
        """All that the launcher, tritonserver, stubs and engines have written."""
        return self._log_path.read_text(errors="replace") if self._log_path.exists() else ""

    def load(self, name: str, timeout_s: float = 60.0) -> None:
        """Load or reload a model."""
        try:
            HTTP.post(f"{self.http}/v2/repository/models/{name}/load", json={}, timeout=timeout_s).raise_for_status()
        except httpx.TimeoutException:
            raise AssertionError(f"{name} did not load within {timeout_s:g} s:\n{self.stacks()}") from None

    def unload(self, name: str, timeout_s: float = 30.0) -> None:
        """Start unloading a model."""
        HTTP.post(f"{self.http}/v2/repository/models/{name}/unload", json={}, timeout=timeout_s).raise_for_status()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels; KeyError if there is none."""
        text = HTTP.get(self.metrics, timeout=10).text
        values = []
        for line in text.splitlines():
            match = re.match(rf"{re.escape(name)}(?:{{(.*)}})? (\S+)$", line)
            if match and all(f'{key}="{value}"' in (match[1] or "") for key, value in labels.items()):
                values.append(float(match[2]))
        if not values:
            raise KeyError(f"{name}{labels or ''}")
        return sum(values)

    def stubs(self, model: str | None = None) -> list[Stub]:
        """The living stub processes, of one model or of all."""
        found = [stub for pid in self.tritonserver_pids() for stub in list_stubs(pid)]
        return [stub for stub in found if model is None or stub.belongs_to(model)]

    def engines(self) -> list[int]:
        """Process ids of all its engines."""
        return [pid for pid, words in self.processes().items() if "flashserve.engine" in words]

    def tritonserver_pids(self) -> list[int]:
        """Process ids of tritonserver (one, or none)."""
        return [pid for pid, words in self.processes().items() if words[0].endswith("/tritonserver")]

    def processes(self) -> dict[int, list[str]]:
        """Command lines by id of every living process that belongs to this server, the launcher included."""
        marker = f"{TEST_VARIABLE}={self.test_id}".encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if marker in (entry / "environ").read_bytes().split(b"\0"):
                        found[int(entry.name)] = (entry / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
                except OSError:
                    continue
        return found

    def leftovers(self) -> list[str]:
        """Processes, shared memory and temporary files that are still there, in words."""
        run_ids = re.findall(r"flashserve-\d+-[0-9a-f]{8}", self.log)
        own = f"flashserve-{self.launcher.pid}-" if self.launcher else "flashserve-none-"
        shared = [name for name in os.listdir("/dev/shm") if name.startswith((own, *run_ids))]
        temporary = self.folder / "tmp"
        return [
            *(f"process {pid}: {' '.join(words)}" for pid, words in self.processes().items()),
            *(f"/dev/shm/{name}" for name in shared),
            *(str(path) for path in (temporary.iterdir() if temporary.exists() else [])),
        ]

    def assert_nothing_left(self, within_s: float = 1.0) -> None:
        """Fails if something is left after `within_s`."""
        wait_until(lambda: not self.leftovers(), within_s)
        left = self.leftovers()
        assert not left, "left behind:\n" + "\n".join(left) + f"\nlog:\n{self.log[-3000:]}"

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> float:
        """SIGTERM, then wait. Returns the seconds until the launcher ended; fails if it does not in time."""
        assert self.launcher is not None, "not started"
        started = time.monotonic()
        self.launcher.send_signal(signal.SIGTERM)
        try:
            self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running {timeout_s:g} s after SIGTERM:\n{self.log[-3000:]}") from None
        return time.monotonic() - started

    def destroy(self) -> None:
        """Kill whatever there is and remove the folder; never fails."""
        for _ in range(20):
            processes = self.processes()
            if not processes:
                break
            for pid in processes:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.1)
        if self.launcher is not None:
            self.launcher.wait(5)
            for name in os.listdir("/dev/shm"):
                if name.startswith(f"flashserve-{self.launcher.pid}-"):
                    os.unlink(f"/dev/shm/{name}")
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        try:
            return self.start()
        except BaseException:
            self.destroy()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.launcher is not None and self.launcher.returncode is None:  # no test has waited for its end
                assert self.launcher.poll() is None, f"the server ended by itself:\n{self.log[-8000:]}"
                self.stop()
            if kind is None:
                self.assert_nothing_left()
        finally:
            self.destroy()


def _waits(thread: Path) -> str:
    """A thread's name, and the system call it is in with its arguments."""
    try:
        return f"{(thread / 'comm').read_text().strip()} {(thread / 'syscall').read_text().strip()}"
    except OSError:
        return "ended"


def wait_until(condition: Callable[[], bool], timeout_s: float, poll_s: float = 0.05) -> bool:
    """Poll until `condition()` holds; returns whether it did in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(poll_s)
    return True


def sse_events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON objects of a generate_stream answer that was read to its end."""
    return [json.loads(line[5:]) for line in response.text.splitlines() if line.startswith("data:")]
