"""``flashserve serve``: start, wait until ready, watch, end."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from flashserve import __version__
from flashserve.launcher import loadable, ports, process, reaper, repository, workspace
from flashserve.launcher.console import Console
from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.discover import require_triton
from flashserve.launcher.ports import Endpoints
from flashserve.launcher.process import ServerProcess
from flashserve.launcher.signals import Signals
from flashserve.launcher.stubs import StubWatch
from flashserve.launcher.triton_arguments import TritonArguments

START_POLL_S = 0.1
# Two looks confirm a death, so a model is being reloaded one second after its stub died.
WATCH_POLL_S = 0.5
# While models load there is nothing to drain.
GRACE_BEFORE_READY_S = 1.0
LOAD_TIMEOUT_S = 3600.0
RELOAD_BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)


@dataclass(frozen=True)
class ServeOptions:
    """What ``flashserve serve`` was asked for."""

    model_repository: str | None = None
    models: Sequence[str] = ()
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    verbose: bool = False
    serve_vllm_models: bool = False
    """Take the place of Triton's vLLM backend, too."""
    backend_module: str = workspace.DEFAULT_BACKEND_MODULE
    triton_arguments: Sequence[str] = field(default=())


def serve(options: ServeOptions, console: Console | None = None) -> int:
    """Serve until a signal comes or tritonserver ends. Returns the exit code."""
    console = console or Console()
    signals = Signals()
    started = time.monotonic()
    install = require_triton()
    named = repository.parse_models(options.models)
    repositories = repository.choose_repositories(options.model_repository, named)
    arguments = TritonArguments.parse(options.triton_arguments)
    vllm = loadable.vllm_server(install, options.serve_vllm_models)
    is_ours = options.backend_module == workspace.DEFAULT_BACKEND_MODULE
    loadable.require_loadable(repositories, named, arguments.load, vllm, judge_files=is_ours)
    endpoints = ports.choose(options.host, options.http_port, options.grpc_port, options.metrics_port)
    space = workspace.create()
    run = reaper.Run(space.run_id, str(space.folder))
    guard = Guard(run)
    server: ServerProcess | None = None
    ready = False
    try:
        backends = repository.OUR_BACKENDS if options.serve_vllm_models else (repository.BACKEND_NAME,)
        workspace.add_backends(space, install, options.backend_module, backends)
        workspace.add_models(space, named)
        if named:
            repositories = [*repositories, str(space.models)]
        line = process.command(install, space, repositories, endpoints, arguments)
        env = process.environment(install, space, endpoints)
        console.say(f"flashserve {__version__}: starting {install}")
        server = ServerProcess(line, env, console.show_log, options.verbose)
        guard.leader(server.pid)
        control = TritonControl(endpoints.http_address)
        ready = _wait_until_ready(server, control, signals, console)
        if not ready:
            return 0 if signals.received else 1
        _announce(console, endpoints, control.ready_models(), time.monotonic() - started)
        return _watch(server, control, signals, console)
    finally:
        _end(run, guard, server, signals, console, reaper.GRACE_S if ready else GRACE_BEFORE_READY_S)


class Guard:
    """The reaper process, which ends the run when this process dies first."""

    def __init__(self, run: reaper.Run) -> None:
        self._run = run
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(reaper.__file__), run.run_id, run.folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )

    def leader(self, pid: int) -> None:
        """Tell it which process leads the run."""
        self._run.leader = pid
        self._tell(f"leader {pid}")

    def dismiss(self) -> None:
        """The run has ended; the reaper has nothing to do."""
        self._tell("ended")
        with contextlib.suppress(OSError):
            self._popen.communicate(timeout=2)

    def _tell(self, line: str) -> None:
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):  # a reaper that was killed must not end the server
            self._popen.stdin.write(line + "\n")
            self._popen.stdin.flush()


def _wait_until_ready(server: ServerProcess, control: TritonControl, signals: Signals, console: Console) -> bool:
    """True when everything is ready; False when it failed (said on the console) or a signal came."""
    started = time.monotonic()
    while not signals.wait(START_POLL_S):
        elapsed = f"{time.monotonic() - started:.0f} s"
        if server.exit_code() is not None:
            server.wait(2)
            console.done()
            _explain_failed_start(server, console)
            return False
        if control.server_ready():
            console.done()
            return True
        loading, done = server.loading(), len(server.ready())
        what = f"loading {', '.join(loading)}" if loading else "starting tritonserver"
        console.progress(f"{elapsed:>4}  {what}" + (f" ({done} ready)" if done else ""))
    console.done()
    return False


def _explain_failed_start(server: ServerProcess, console: Console) -> None:
    failures = server.failures()
    for name, reason in failures.items():
        console.fail(f"model {name} could not be loaded: {reason}")
    if failures:
        console.say("  → flashserve doctor shows what is missing; --verbose shows Triton's log")
        return
    console.fail(f"tritonserver ended with code {server.exit_code()} before it was ready. Its last lines:")
    for line in server.last_lines(15):
        console.say(f"    {line}")
    console.say("  → flashserve doctor shows what is missing; --verbose shows the whole log")


def _announce(console: Console, endpoints: Endpoints, names: Sequence[str], seconds: float) -> None:
    host = "localhost" if endpoints.local_host == "127.0.0.1" else endpoints.local_host
    console.say(f"ready in {seconds:.1f} s: {', '.join(names) or 'no model'}")
    console.say(f"  HTTP     http://{host}:{endpoints.http}")
    console.say(f"  gRPC     {host}:{endpoints.grpc}")
    console.say(f"  metrics  http://{host}:{endpoints.metrics}/metrics")
    if names:
        name = "demo" if "demo" in names else names[0]
        body = {"text_input": "def fibonacci(n):", "stream": True}
        body["sampling_parameters"] = json.dumps({"max_tokens": 48})
        console.say("try:")
        console.say(f"  curl -N {host}:{endpoints.http}/v2/models/{name}/generate_stream -d '{json.dumps(body)}'")
    console.say("Ctrl-C ends it.")


def _watch(server: ServerProcess, control: TritonControl, signals: Signals, console: Console) -> int:
    """Until a signal (0) or the end of tritonserver (1); reloads models whose stub died."""
    stubs = StubWatch(server.pid, control)
    reloads: dict[str, Reload] = {}
    while not signals.wait(WATCH_POLL_S):
        if server.exit_code() is not None:
            server.wait(2)
            console.fail(f"tritonserver ended by itself with code {server.exit_code()}. Its last lines:")
            for line in server.last_lines(15):
                console.say(f"    {line}")
            return 1
        for name in stubs.dead_models():
            reloads.setdefault(name, Reload(name, control, console)).start_when_due()
    return 0


class Reload:
    """Brings one model back, again and again if need be, without holding up the watch."""

    def __init__(self, name: str, control: TritonControl, console: Console) -> None:
        self._name = name
        self._control = control
        self._console = console
        self._thread: threading.Thread | None = None
        self._failures = 0

    def start_when_due(self) -> None:
        """Start a reload in a thread, unless one is under way."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._thread = threading.Thread(target=self._reload, daemon=True)
        self._thread.start()

    def _reload(self) -> None:
        started = time.monotonic()
        self._console.say(f"model {self._name}: its backend process died; reloading it")
        while True:
            time.sleep(RELOAD_BACKOFF_S[min(self._failures, len(RELOAD_BACKOFF_S) - 1)])
            try:
                self._control.unload(self._name)
                self._control.load(self._name, LOAD_TIMEOUT_S)
            except ControlError as error:
                self._failures += 1
                self._console.say(f"model {self._name}: reloading failed, will try again: {error}")
                continue
            self._failures = 0
            self._console.say(f"model {self._name}: ready again after {time.monotonic() - started:.1f} s")
            return


def _end(
    run: reaper.Run,
    guard: Guard,
    server: ServerProcess | None,
    signals: Signals,
    console: Console,
    grace_s: float,
) -> None:
    started = time.monotonic()
    if server is not None and server.exit_code() is None:
        console.say("ending: running requests may finish (again Ctrl-C: at once)")
    peaceful = reaper.end_run(run, grace_s, hurry=lambda: signals.hurry)
    if server is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(2)
        how = "" if peaceful else ", the rest was killed"
        console.say(f"ended after {time.monotonic() - started:.1f} s{how}")
    guard.dismiss()
