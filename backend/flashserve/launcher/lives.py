"""Keeps a tritonserver alive: one after another, each with the models that its predecessor had.

A process is healthy when it answers, not when it exists. So a server that died, one that no longer answers, and one
with a load that cannot end are the same to the launcher: it says why, ends what is left, and starts anew, after a pause
and not without a limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence

from flashserve.launcher import reaper
from flashserve.launcher.console import Console
from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.ending import Guard
from flashserve.launcher.health import Failure, HealthWatch
from flashserve.launcher.loads import Loads
from flashserve.launcher.orphans import Orphans
from flashserve.launcher.ports import Endpoints
from flashserve.launcher.process import ServerProcess
from flashserve.launcher.reloads import SERVER_FAILED, Reloads
from flashserve.launcher.restarts import Restarts
from flashserve.launcher.signals import Signals
from flashserve.launcher.stubs import FrozenStubs, LoadWatch, StubWatch

POLL_S = 0.1
REAP_WAIT_S = 2.0


class Lives:
    """One tritonserver after another. ``server`` is the present one, if there is one."""

    def __init__(
        self,
        start: Callable[[Sequence[str]], ServerProcess],
        run: reaper.Run,
        guard: Guard,
        endpoints: Endpoints,
        signals: Signals,
        console: Console,
        loads: Loads,
        expected: Collection[str],
        max_restarts: int,
        answer_timeout_s: float,
    ) -> None:
        """``start`` starts one that loads the models given; ``expected`` are those known to run in stubs. It is started
        anew so many times, also after ``answer_timeout_s`` without an answer."""
        self.server: ServerProcess | None = None
        self.was_ready = False
        self._start = start
        self._run = run
        self._guard = guard
        self._endpoints = endpoints
        self._signals = signals
        self._console = console
        self._loads = loads
        self._expected = expected
        self._control = TritonControl(endpoints.http_address, unlisted=loads.names)
        self._orphans = Orphans()
        self._restarts = Restarts(max_restarts)
        self._answer_timeout_s = answer_timeout_s
        self._ready_since: float | None = None

    def live(self, load: Sequence[str], announce: Callable[[Sequence[str], float], None]) -> int:
        """Until a signal (0), or until starting anew does not help (1)."""
        models = load
        while True:
            started = time.monotonic()
            self._ready_since = None
            # Tritonserver's own start knows repositories only.
            of_clients = [name for name in models if self._loads.are_a_clients(name)]
            self.server = server = self._start([name for name in models if name not in of_clients])
            self._guard.leader(server.pid)
            self._frozen = FrozenStubs(server.pid, self._answer_timeout_s)
            failure = self._wait_until_ready(server)
            if failure is None and not self._signals.received:
                models = self._ready_models(models)
            self._loads.started(name for name in models if name not in of_clients)
            if failure is None and not self._signals.received:
                announce(models, time.monotonic() - started)
                failure, models = self._watch(server, models, of_clients)
                if failure is not None:
                    self._loads.keep_files(models)
            if failure is None:
                return 0
            if not self._goes_on_after(failure, server):
                return 0 if self._signals.received else 1
            if self.was_ready:
                models = self._without_broken(models, server)

    def _wait_until_ready(self, server: ServerProcess) -> Failure | None:
        """None when everything is ready, or a signal came."""
        console, started = self._console, time.monotonic()
        loads = LoadWatch(server.pid, self._expected)
        while not self._wait(server):
            elapsed = f"{time.monotonic() - started:.0f} s"
            if server.exit_code() is not None:
                server.wait(REAP_WAIT_S)
                console.done()
                _explain_failed_start(server, console)
                return Failure("tritonserver ended before it was ready", is_final=not self.was_ready)
            if self._control.server_ready():
                console.done()
                self.was_ready = True
                self._ready_since = time.monotonic()
                return None
            loading, done = server.loading(), len(server.ready())
            stuck = loads.stuck(loading)
            if stuck is not None:
                console.done()
                return Failure(stuck)
            what = f"loading {', '.join(loading)}" if loading else "starting tritonserver"
            console.progress(f"{elapsed:>4}  {what}" + (f" ({done} ready)" if done else ""))
        console.done()
        return None

    def _wait(self, server: ServerProcess) -> bool:
        """Sleep, and do what is due about once a second; True if a signal has come."""
        for stub in self._frozen.find():
            self._console.fail(f"the backend process {stub.pid} of model {stub.model} does not run: it is ended")
            with contextlib.suppress(ProcessLookupError):
                os.kill(stub.pid, signal.SIGKILL)
        self._orphans.reap((server.pid, self._guard.pid))
        return self._signals.wait(POLL_S)

    def _ready_models(self, asked: Sequence[str]) -> list[str]:
        try:
            return self._control.ready_models()
        except ControlError:  # it has just said that it is ready; the watch will find out
            return [name for name in asked if name != "*"]

    def _watch(
        self, server: ServerProcess, names: Sequence[str], of_clients: Sequence[str]
    ) -> tuple[Failure | None, list[str]]:
        """Until a signal (None) or a failure; with the models that it had. ``names`` are ready, ``of_clients`` are to
        be brought back."""
        reloads = Reloads(self._control, self._console, self._loads)
        reloads.start(of_clients, SERVER_FAILED)
        metrics = TritonControl(self._endpoints.metrics_address)
        stubs, loads = StubWatch(server.pid, self._control), LoadWatch(server.pid, self._expected)
        health = HealthWatch(self._control, metrics, stubs, loads, reloads, names, self._answer_timeout_s)
        health.start()
        try:
            while not self._wait(server):
                if server.exit_code() is not None:
                    server.wait(REAP_WAIT_S)
                    self._console.fail(f"tritonserver ended by itself with code {server.exit_code()}. Its last lines:")
                    for line in server.last_lines(15):
                        self._console.say(f"    {line}")
                    return Failure(f"tritonserver ended by itself with code {server.exit_code()}"), health.models
                if health.failure is not None:
                    return health.failure, health.models
            return None, health.models
        finally:
            reloads.stop()
            health.stop()

    def _goes_on_after(self, failure: Failure, server: ServerProcess) -> bool:
        """End what is left of a life. False if it was the last; what its end leaves undone is then the launcher's."""
        console = self._console
        if failure.is_final:
            return False
        served_s = time.monotonic() - self._ready_since if self._ready_since is not None else 0.0
        pause_s = self._restarts.pause_s(served_s)
        if pause_s is None:
            console.fail(f"{failure.reason}, {self._restarts.summary}")
            return False
        console.fail(f"{failure.reason}: it is started anew with the models that it had")
        # Beside a server that answers, requests may end; of one that does not, nobody hears their answers.
        reaper.end_processes(self._run, reaper.GRACE_S if failure.answers else 0.0, lambda: self._signals.hurry)
        server.wait(REAP_WAIT_S)
        self._orphans.reap((server.pid, self._guard.pid), at_once=True)
        self._guard.leader(None)
        reaper.clear(self._run)
        return not self._signals.wait(pause_s)

    def _without_broken(self, models: Sequence[str], server: ServerProcess) -> list[str]:
        """Without those that have failed to load in start after start: the others are to serve."""
        broken = self._restarts.given_up(server.failures())
        for name in broken:
            self._console.fail(f"model {name} is left out from now on", "load it when it is in order again")
        return [name for name in models if name not in broken]


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
