"""Notices stub processes that died. Triton keeps calling such a model ready, and its requests hang."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.repository import PYTHON_BACKENDS
from flashserve.progress import Progress
from flashserve.stub_processes import Stub, list_stubs

# Looked at twice before it counts: an unload ends the stub a moment before the model's state says so.
CONFIRMATIONS = 2
# A model has one stub to complete its configuration and then those of its instances, milliseconds later.
GONE_S = 10.0
LOOK_PERIOD_S = 1.0
NEVER_STARTED_S = 20.0  # or it died before anybody saw it


class StubWatch:
    """Compares the stubs that live with those that the ready models need."""

    def __init__(self, server: int, control: TritonControl) -> None:
        self._server = server
        self._control = control
        self._complete: frozenset[int] = frozenset()
        self._missing: dict[str, int] = {}

    def dead_models(self) -> list[str]:
        """Models that Triton calls ready although a stub of theirs is gone. Call it about once a second."""
        stubs = list_stubs(self._server)
        pids = frozenset(stub.pid for stub in stubs)
        if pids and pids == self._complete:
            return []
        try:
            lacking = self._lacking(stubs)
        except ControlError:  # starting, stopping or overloaded: says nothing about stubs
            return []
        self._missing = {name: self._missing.get(name, 0) + 1 for name in lacking}
        self._complete = pids if not lacking else frozenset()
        return [name for name, seen in self._missing.items() if seen >= CONFIRMATIONS]

    def _lacking(self, stubs: list[Stub]) -> list[str]:
        ready = [row["name"] for row in self._control.index() if row.get("state") == "READY"]
        lacking = []
        for name in dict.fromkeys(ready):
            needed = ready.count(name) * self._instances(name)
            if sum(stub.belongs_to(name) for stub in stubs) < needed:
                lacking.append(name)
        return lacking

    def _instances(self, name: str) -> int:
        config = self._control.config(name)
        if config.get("backend") not in PYTHON_BACKENDS:
            return 0
        return sum(
            int(group.get("count", 1)) * max(1, len(group.get("gpus", [])))
            for group in config.get("instance_group", [])
        )


class FrozenStubs:
    """Finds stubs that exist and do not run. Triton waits for them without a bound, while a model loads as later."""

    def __init__(self, server: int, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """``limit_s``: so long one may be still; 0: for ever. Even an idle one looks for its parent every 0.3 s."""
        self._server = server
        self._limit_s = limit_s
        self._clock = clock
        self._looked = clock()
        self._progress: dict[int, Progress] = {}

    def find(self) -> list[Stub]:
        """Those over the limit. It looks once a second, however often it is asked."""
        if not self._limit_s or self._clock() - self._looked < LOOK_PERIOD_S:
            return []
        self._looked = self._clock()
        stubs = list_stubs(self._server)
        self._progress = {stub.pid: self._progress.get(stub.pid) or Progress(stub.pid, self._clock) for stub in stubs}
        return [stub for stub in stubs if self._progress[stub.pid].idle_s() > self._limit_s]


class LoadWatch:
    """Finds loads that cannot end: Triton 2.51 waits without a bound for a stub that died before it was initialised."""

    def __init__(self, server: int, expected: Collection[str], clock: Callable[[], float] = time.monotonic) -> None:
        """``expected``: models that are known to run in stubs; one of another name may be of another backend."""
        self._server = server
        self._expected = expected
        self._clock = clock
        self._last_seen: dict[str, float] = {}
        """Of models that load: when a stub of theirs lived last."""
        self._first_loading: dict[str, float] = {}

    def stuck(self, loading: Collection[str]) -> str | None:
        """Why one of the models that are ``loading`` will never be ready; None as long as all may be."""
        if not loading:
            self._last_seen.clear()
            self._first_loading.clear()
            return None
        now, stubs = self._clock(), list_stubs(self._server)
        alive = {name for name in loading if any(stub.belongs_to(name) for stub in stubs)}
        for name in [name for name in self._first_loading if name not in loading]:
            del self._first_loading[name]
            self._last_seen.pop(name, None)
        for name in loading:
            if alive:  # Triton loads a few at a time: this one may wait for its turn
                self._first_loading[name] = now
            first = self._first_loading.setdefault(name, now)
            if name in alive:
                self._last_seen[name] = now
            seen = self._last_seen.get(name)
            if seen is not None and now - seen > GONE_S:
                return f"model {name} cannot become ready: its process died while it loaded"
            if seen is None and name in self._expected and now - first > NEVER_STARTED_S:
                return f"model {name} cannot become ready: it has no process after {NEVER_STARTED_S:.0f} s"
        return None
