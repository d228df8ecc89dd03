"""Tritonserver's stub processes, one per instance of a model, read from /proc; and where their engines leave traces."""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

STUB_NAME = "triton_python_backend_stub"
# Names a file that is there once everything is to end. It says until when requests must have ended, in seconds of
# time.monotonic().
ENDING_VARIABLE = "FLASHSERVE_ENDING"
# A bucket's model is served from a local copy, /tmp/folderXXXXXX, which does not carry its name.
COPY = re.compile(r"folder\w{6}")


@dataclass(frozen=True)
class Stub:
    """A living stub process: one instance of one model."""

    pid: int
    model_path: str
    """Second word of its command line: ``<repository>/<model>/<version>/model.py``."""
    instance: str
    """Ninth word: ``<instance group>_<index>``."""
    started: int = 0
    """Clock ticks since the machine started."""

    def belongs_to(self, model: str) -> bool:
        """True if it is an instance of ``model``."""
        folder = Path(self.model_path).parent.parent.name
        if COPY.fullmatch(folder):
            return re.fullmatch(rf"{re.escape(model)}_\d+(_\d+)?", self.instance) is not None
        return folder == model

    @property
    def model(self) -> str:
        """The model's name; for messages, as a model's folder may have another."""
        folder = Path(self.model_path).parent.parent.name
        return self.instance if COPY.fullmatch(folder) else folder

    def replaces(self, other: Stub) -> bool:
        """True if it is a later start of the same instance: a model that changes while it is served is loaded anew
        before the old one is unloaded."""
        same_model = _without_copy(self.model_path) == _without_copy(other.model_path)
        return same_model and self.instance == other.instance and self.started > other.started


def _without_copy(model_path: str) -> str:
    return COPY.sub("folder", model_path)


def parse_stub(pid: int, command_line: list[str], started: int = 0) -> Stub | None:
    """A stub from its command line; None for any other process (a dead one has no command line)."""
    if len(command_line) < 9 or Path(command_line[0]).name != STUB_NAME:
        return None
    return Stub(pid, command_line[1], command_line[8], started)


def list_stubs(server: int) -> list[Stub]:
    """The living stubs of a tritonserver."""
    stubs = []
    for pid in children(server):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
            started = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        except OSError:
            continue
        stub = parse_stub(pid, words, started)
        if stub:
            stubs.append(stub)
    return stubs


def has_predecessor() -> bool:
    """In a stub: whether an earlier start of the instance that it serves still lives, to end its requests."""
    stubs = list_stubs(os.getppid())
    own = next((stub for stub in stubs if stub.pid == os.getpid()), None)
    return own is not None and any(own.replaces(other) for other in stubs)


def trace_file(engine: int, folder: str | None = None) -> Path:
    """Where the engine with this process id writes its trace; ``folder`` is its TMPDIR, default one's own."""
    return Path(folder or tempfile.gettempdir(), f"flashserve-trace-{engine}.json")


def children(pid: int) -> list[int]:
    """Ids of a process's children, zombies among them."""
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
