"""Notices stub processes that died. Triton keeps calling such a model ready, and its requests hang."""

from __future__ import annotations

from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.repository import OUR_BACKENDS
from flashserve.stub_processes import Stub, list_stubs

# Looked at twice before it counts: an unload ends the stub a moment before the model's state says so.
CONFIRMATIONS = 2
PYTHON_BACKENDS = (*OUR_BACKENDS, "python")


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
