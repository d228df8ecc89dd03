"""``flashserve trace``: has the engines of this machine write down what they have just done."""

from __future__ import annotations

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from flashserve.launcher.errors import LauncherError
from flashserve.stub_processes import list_stubs, trace_file

WRITE_TIMEOUT_S = 20.0  # a trace takes 0.4 s; a step of a large prompt on a CPU may have to end first


@dataclass(frozen=True)
class EngineProcess:
    """A living engine process."""

    pid: int
    model: str


def find_engines() -> list[EngineProcess]:
    """Those of all tritonservers that this user may look into."""
    found = []
    for server in psutil.process_iter(["name"]):
        if server.info["name"] != "tritonserver":
            continue
        for stub in list_stubs(server.pid):
            model = Path(stub.model_path).parent.parent.name
            found += [EngineProcess(pid, model) for pid in _engines_of(stub.pid)]
    return sorted(found, key=lambda engine: (engine.model, engine.pid))


def _engines_of(stub: int) -> list[int]:
    try:
        children = psutil.Process(stub).children()
        return [child.pid for child in children if "flashserve.engine" in child.cmdline() and _writes_traces(child.pid)]
    except (psutil.Error, OSError):  # it has just ended
        return []


def _writes_traces(pid: int) -> bool:
    """Whether it handles the signal: one that is still loading has nothing to show, and might not survive it."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (signal.SIGUSR2 - 1) & 1)


def choose(engines: list[EngineProcess], model: str | None) -> list[EngineProcess]:
    """The engines of the model that is meant. Raises LauncherError."""
    models = sorted({engine.model for engine in engines})
    if not models:
        raise LauncherError("no engine runs on this machine", "start one with `flashserve serve`")
    if model is None and len(models) > 1:
        raise LauncherError("several models are served", f"choose one with --model: {', '.join(models)}")
    chosen = [engine for engine in engines if model in (None, engine.model)]
    if not chosen:
        raise LauncherError(f"no engine serves {model}", f"these are served: {', '.join(models)}")
    return chosen


def save_trace(engine: EngineProcess, target: Path) -> None:
    """Have it write its trace, and move that to ``target``. Raises LauncherError."""
    try:
        written = trace_file(engine.pid, psutil.Process(engine.pid).environ().get("TMPDIR", "/tmp"))
        written.unlink(missing_ok=True)
        os.kill(engine.pid, signal.SIGUSR2)
        deadline = time.monotonic() + WRITE_TIMEOUT_S
        while not written.exists():
            if time.monotonic() > deadline:
                raise LauncherError(
                    f"the engine of {engine.model} wrote nothing within {WRITE_TIMEOUT_S:.0f} s",
                    f"is it stuck in a step? `kill -USR1 {engine.pid}` writes its stacks to the log",
                )
            time.sleep(0.02)
    except (psutil.Error, OSError) as error:
        raise LauncherError(f"the engine of {engine.model} cannot be asked: {error}", "is it yours?") from error
    try:
        shutil.move(written, target)
    except OSError as error:
        raise LauncherError(f"cannot write {target}: {error.strerror}", "choose another file with --output") from error
    finally:
        written.unlink(missing_ok=True)
