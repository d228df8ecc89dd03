"""Brings models back, each in a thread of its own: whose stub died, and what clients loaded into an earlier server."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable

from flashserve.launcher.console import Console
from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.loads import Loads

LOAD_TIMEOUT_S = 3600.0
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)
STOP_TIMEOUT_S = 0.5
STUB_DIED, SERVER_FAILED = "its backend process died", "tritonserver was started anew"


class Reloads:
    """Those of one tritonserver's life."""

    def __init__(self, control: TritonControl, console: Console, loads: Loads) -> None:
        self._control = control
        self._console = console
        self._loads = loads
        self._by_name: dict[str, Reload] = {}

    def start(self, names: Iterable[str], reason: str = STUB_DIED) -> None:
        """Reload these, unless that is under way."""
        for name in names:
            reload = self._by_name.setdefault(name, Reload(name, self._control, self._console, self._loads))
            reload.start_when_due(reason)

    @property
    def pending(self) -> list[str]:
        """Models that are not back yet."""
        return [name for name, reload in self._by_name.items() if reload.is_under_way]

    def stop(self) -> None:
        """No further tries. A call to Triton that is under way ends with tritonserver."""
        for reload in self._by_name.values():
            reload.stop()


class Reload:
    """Brings one model back, again and again if need be, without holding up the watch."""

    def __init__(self, name: str, control: TritonControl, console: Console, loads: Loads) -> None:
        self._name = name
        self._control = control
        self._console = console
        self._loads = loads
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start_when_due(self, reason: str) -> None:
        """Start a reload in a thread, unless one is under way."""
        if not self.is_under_way and not self._stopping.is_set():
            self._thread = threading.Thread(
                target=self._reload, args=(reason,), name=f"reload-{self._name}", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _reload(self, reason: str) -> None:
        started = time.monotonic()
        is_loaded = reason == STUB_DIED
        try:
            parameters = self._loads.parameters(self._name)  # before the unload: then Triton removes the files
        except OSError as error:
            self._give_up(f"{reason}, and the files that a client loaded it with are gone: {error}", is_loaded)
            return
        how = " with what a client loaded it with" if parameters else ""
        self._console.say(f"model {self._name}: {reason}; reloading it{how}")
        while not self._stopping.wait(BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]):
            try:
                if is_loaded:
                    self._control.unload(self._name)
                self._control.load(self._name, LOAD_TIMEOUT_S, parameters)
            except ControlError as error:
                self._failures += 1
                if not self._stopping.is_set():
                    self._console.say(f"model {self._name}: reloading failed, will try again: {error}")
                continue
            self._failures = 0
            self._console.say(f"model {self._name}: ready again after {time.monotonic() - started:.1f} s")
            return

    def _give_up(self, why: str, is_loaded: bool) -> None:
        """What the repository holds is another model: none is served rather than that."""
        self._console.fail(f"model {self._name}: {why}", "load it again")
        if is_loaded:  # so that its readiness says so
            with contextlib.suppress(ControlError):
                self._control.unload(self._name)
