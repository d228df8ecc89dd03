"""Brings models back whose stub died, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable

from flashserve.launcher.console import Console
from flashserve.launcher.control import ControlError, TritonControl

LOAD_TIMEOUT_S = 3600.0
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)
STOP_TIMEOUT_S = 0.5


class Reloads:
    """Those of one tritonserver's life."""

    def __init__(self, control: TritonControl, console: Console) -> None:
        self._control = control
        self._console = console
        self._by_name: dict[str, Reload] = {}

    def start(self, names: Iterable[str]) -> None:
        """Reload these, unless that is under way."""
        for name in names:
            self._by_name.setdefault(name, Reload(name, self._control, self._console)).start_when_due()

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

    def __init__(self, name: str, control: TritonControl, console: Console) -> None:
        self._name = name
        self._control = control
        self._console = console
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._failures = 0

    @property
    def is_under_way(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start_when_due(self) -> None:
        """Start a reload in a thread, unless one is under way."""
        if not self.is_under_way and not self._stopping.is_set():
            self._thread = threading.Thread(target=self._reload, name=f"reload-{self._name}", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)

    def _reload(self) -> None:
        started = time.monotonic()
        self._console.say(f"model {self._name}: its backend process died; reloading it")
        while not self._stopping.wait(BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]):
            try:
                self._control.unload(self._name)
                self._control.load(self._name, LOAD_TIMEOUT_S)
            except ControlError as error:
                self._failures += 1
                if not self._stopping.is_set():
                    self._console.say(f"model {self._name}: reloading failed, will try again: {error}")
                continue
            self._failures = 0
            self._console.say(f"model {self._name}: ready again after {time.monotonic() - started:.1f} s")
            return
