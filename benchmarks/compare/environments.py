"""The peers' virtual environments and model files, made once under the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.results import ROOT
from benchmarks.compare.engines import ENVIRONMENTS, Engine, Environment, Preparation

PROGRESS_EVERY_S = 10.0


class NotAvailable(Exception):
    """An engine cannot take part; the text is the reason for the table."""


def python_of(engine: Engine, cache: Path) -> str:
    """The interpreter that runs the engine's worker."""
    return sys.executable if engine.environment is None else str(_program(cache, engine.environment, "python"))


def variables_of(engine: Engine) -> dict[str, str]:
    """The environment variables of the engine's worker: a peer must not see this project's packages."""
    return dict(os.environ) if engine.environment is None else _clean_variables()


def make_environment(name: str, cache: Path) -> None:
    """Create the environment unless it is there. Raises NotAvailable."""
    environment = ENVIRONMENTS[name]
    folder = cache / "venvs" / name
    stamp = folder / "flashserve-bench.stamp"
    wanted = _fingerprint(environment)
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = log_file(cache, f"install-{name}")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    print(f"{name}: installing {', '.join(environment.requirements)} ({environment.note})", flush=True)
    _run([sys.executable, "-m", "venv", str(folder)], log, 120.0, f"{name}: venv")
    install = [*pip, "install", *environment.pip_arguments, *environment.requirements]
    _run(install, log, environment.timeout_s, f"{name}: pip")
    if environment.unwanted:
        _run([*pip, "uninstall", "-y", *environment.unwanted], log, 120.0, f"{name}: pip")
    stamp.write_text(wanted)


def prepared_model(engine: Engine, model: Path, cache: Path) -> Path:
    """What the engine reads: the checkpoint, or what its preparation makes of it. Raises NotAvailable."""
    preparation = engine.preparation
    if preparation is None:
        return model
    out = model.with_name(model.name + preparation.suffix)
    if not out.exists():
        # Suffixes matter to some exporters, so the unfinished one goes into a folder of its own.
        unfinished = model.with_name(f"unfinished-{os.getpid()}") / out.name
        unfinished.parent.mkdir()
        try:
            _prepare(preparation, engine.title, model, unfinished, cache)
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
    return out


def _prepare(preparation: Preparation, title: str, model: Path, out: Path, cache: Path) -> None:
    program, *arguments = preparation.command
    words = [word.format(model=model, out=out) for word in arguments]
    command = [str(_program(cache, preparation.environment, program)), *words]
    _run(
        command,
        log_file(cache, f"prepare{preparation.suffix}"),
        preparation.timeout_s,
        f"{title}: converting the model",
    )


def _program(cache: Path, environment: str, name: str) -> Path:
    return cache / "venvs" / environment / "bin" / name


def log_file(cache: Path, name: str) -> Path:
    """The file that keeps what a child of that name writes."""
    (cache / "logs").mkdir(parents=True, exist_ok=True)
    return cache / "logs" / f"{name}.log"


def _fingerprint(environment: Environment) -> str:
    facts = repr((environment.requirements, environment.unwanted, environment.pip_arguments, sys.version_info[:2]))
    return hashlib.sha256(facts.encode()).hexdigest()


def _clean_variables() -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours}


def _run(command: Sequence[str], log: Path, timeout_s: float, what: str) -> None:
    """Run a command to its end, saying every few seconds how far it is. Raises NotAvailable."""
    started = said = time.monotonic()
    with log.open("ab") as sink:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=_clean_variables(),
            cwd=ROOT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            now = time.monotonic()
            if now - started > timeout_s:
                raise NotAvailable(f"{what} took more than {timeout_s:.0f} s; {log}")
            if now - said > PROGRESS_EVERY_S:
                said = now
                print(f"  {what}, {now - started:.0f} s: {_last_line(log)[:90]}", flush=True)
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != 0:
        raise NotAvailable(f"{what} failed: {_last_line(log)[:160]} ({log})")


def _last_line(log: Path) -> str:
    """The last line that tells something; pip's last words are often warnings."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[-200:] if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR", "error:"))]
    useful = [line for line in lines if not line.startswith(("WARNING", "[notice]"))]
    return (errors or useful or [""])[-1]
