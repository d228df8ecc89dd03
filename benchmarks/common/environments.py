"""The peers' virtual environments and model files, made once under the cache folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.engines import ENVIRONMENTS, Engine, Environment
from benchmarks.common.results import ROOT


class NotAvailable(Exception):
    """An engine cannot take part; the text is the reason for the table."""


def command_of(engine: Engine, cache: Path) -> list[str]:
    """That runs the engine's worker."""
    own = engine.environment is None
    python = sys.executable if own else str(_program(cache, str(engine.environment), "python"))
    return [python, "-m", f"benchmarks.common.peers.{engine.script}"]


def variables_of(engine: Engine) -> dict[str, str]:
    """The environment variables of the engine's worker: a peer must not see this project's packages."""
    return dict(os.environ) if engine.environment is None else _clean_variables()


def make_environments(engine: Engine, cache: Path) -> None:
    """Create what the engine needs unless it is there. Raises NotAvailable."""
    for name in {engine.environment, engine.preparation and engine.preparation.environment} - {None}:
        _make_environment(str(name), ENVIRONMENTS[str(name)], cache)


def _make_environment(name: str, environment: Environment, cache: Path) -> None:
    folder = cache / "venvs" / name
    stamp = folder / "flashserve-bench.stamp"
    facts = repr((environment.requirements, environment.unwanted, environment.pip_arguments, sys.version_info[:2]))
    wanted = hashlib.sha256(facts.encode()).hexdigest()
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    log = log_file(cache, f"install-{name}")
    print(f"{name}: installing {', '.join(environment.requirements)} ({environment.note}); {log}", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(folder)], log, 120.0, f"{name}: venv")
    install = [*pip, "install", *environment.pip_arguments, *environment.requirements]
    _run(install, log, environment.timeout_s, f"{name}: pip")
    if environment.unwanted:
        _run([*pip, "uninstall", "-y", *environment.unwanted], log, 120.0, f"{name}: pip")
    stamp.write_text(wanted)


def prepared_model(engine: Engine, model: Path, cache: Path) -> Path:
    """The model as the engine reads it, converted unless that is there. Raises NotAvailable."""
    preparation = engine.preparation
    if preparation is None:
        return model
    out = model.with_name(model.name + preparation.suffix)
    if not out.exists():
        # Suffixes matter to some exporters, so the unfinished one goes into a folder of its own.
        unfinished = model.with_name(f"unfinished-{os.getpid()}") / out.name
        unfinished.parent.mkdir()
        program, *arguments = preparation.command
        words = [word.format(model=model, out=unfinished) for word in arguments]
        command = [str(_program(cache, preparation.environment, program)), *words]
        log = log_file(cache, f"prepare{preparation.suffix}")
        try:
            _run(command, log, preparation.timeout_s, f"{engine.title}: converting the model")
            unfinished.rename(out)
        finally:
            shutil.rmtree(unfinished.parent, ignore_errors=True)
    return out


def log_file(cache: Path, name: str) -> Path:
    """The file that keeps what a child of that name writes."""
    (cache / "logs").mkdir(parents=True, exist_ok=True)
    return cache / "logs" / f"{name}.log"


def _program(cache: Path, environment: str, name: str) -> Path:
    return cache / "venvs" / environment / "bin" / name


def _clean_variables() -> dict[str, str]:
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in os.environ.items() if name not in ours}


def _run(command: Sequence[str], log: Path, timeout_s: float, what: str) -> None:
    """Run a command to its end. Raises NotAvailable."""
    with log.open("ab") as sink:
        try:
            subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=_clean_variables(), cwd=ROOT,
                timeout=timeout_s, check=True,
            )  # fmt: skip
        except (subprocess.SubprocessError, OSError) as error:
            raise NotAvailable(f"{what}: {type(error).__name__}; {log}") from None
