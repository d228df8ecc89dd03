"""Notices stub processes that died. Triton keeps calling such a model ready, and its requests hang."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.discover import STUB_NAME

# Looked at twice before it counts: an unload ends the stub a moment before the model's state says so.
CONFIRMATIONS = 2
PYTHON_BACKENDS = ("flashserve", "python")


@dataclass(frozen=True)
class Stub:
    """A living stub process: one instance of one model."""

    pid: int
    model_path: str
    """Second word of its command line: ``<repository>/<model>/<version>/model.py``."""
    instance: str
    """Ninth word: ``<instance group>_<index>``."""

    def belongs_to(self, model: str) -> bool:
        """True if it is an instance of ``model``."""
        folder = Path(self.model_path).parent.parent.name
        # A bucket's model is served from a local copy, /tmp/folderXXXXXX, which does not carry its name.
        if re.fullmatch(r"folder\w{6}", folder):
            return re.fullmatch(rf"{re.escape(model)}_\d+(_\d+)?", self.instance) is not None
        return folder == model


def parse_stub(pid: int, command_line: list[str]) -> Stub | None:
    """A stub from its command line; None for any other process (a dead one has no command line)."""
    if len(command_line) < 9 or Path(command_line[0]).name != STUB_NAME:
        return None
    return Stub(pid, command_line[1], command_line[8])


def list_stubs(server: int) -> list[Stub]:
    """The living stubs of a tritonserver."""
    stubs = []
    for pid in _children(server):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        stub = parse_stub(pid, words)
        if stub:
            stubs.append(stub)
    return stubs


def _children(pid: int) -> list[int]:
    # The kernel's own list: 1 ms for a server's 100 threads, where psutil reads every process of the machine.
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except FileNotFoundError:  # a kernel without that list
        import psutil

        try:
            found = [child.pid for child in psutil.Process(pid).children()]
        except psutil.Error:
            return []
    return found


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
