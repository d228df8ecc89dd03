"""Runs the steps of a stage, each in a process group of its own under its own limit, and keeps what is known so far.

The result is written anew while a step runs and after it: whatever ends this process loses a second's figures at most.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks.common.results import ROOT, slug, write_json
from benchmarks.gpu_check.goals import judge
from benchmarks.gpu_check.outcomes import VARIABLE, read_outcomes
from benchmarks.gpu_check.steps import Step

State = Literal["not started", "running", "ok", "failed", "timed out", "interrupted", "no time left", "left out"]

POLL_S, WRITE_EVERY_S = 0.05, 1.0
TAIL_LINES = 15
LEAST_S = 3.0  # of a stage, under which no step is begun
DRY_PATIENCE = 8  # times the limits: a dry run measures nothing, and its machine may have other work
PATHS = (".", "backend", "kernels", "client", "tests/support")


@dataclass
class Outcome:
    """What became of a step."""

    state: State
    limit_s: int
    seconds: float = 0.0
    tail: list[str] = field(default_factory=list)
    """The end of what it wrote, where it did not end well."""


class Check:
    """One stage: its files, and what is known of its steps."""

    def __init__(
        self, steps: Sequence[Step], values: Mapping[str, str], work: Path, output: Path, name: str, *, dry: bool
    ) -> None:
        """values: what the placeholders of commands stand for; ``figures`` and ``machine`` are files that steps write.
        work: an empty folder; output: where <card>/<name>.json and .log are written."""
        self._steps, self._values, self._work, self._output = steps, dict(values), work, output
        self._name, self._dry, self._patience = name, dry, DRY_PATIENCE if dry else 1
        self._outcomes_file, self._log = work / "outcomes", work / "log"
        self._file: Path | None = None
        self._stopped = False
        self.done = {step.name: Outcome("not started", step.limit_s) for step in steps}

    def stop(self, *_: object) -> None:
        """End the step under way, and begin no other. For a signal's handler: an exception that it raised might come
        between a process's start and the moment from which it is known here."""
        self._stopped = True

    def run(self, limit_s: float) -> None:
        """All steps in order, within so many seconds."""
        end = time.monotonic() + limit_s * self._patience
        for step in self._steps:
            if self._stopped:
                return
            outcome, words = self.done[step.name], step.words(self._values, self._dry)
            left = end - time.monotonic()
            limit_s = min(step.limit_s * self._patience, left)
            if words is None:
                outcome.state = "left out"
            elif left < LEAST_S:
                outcome.state = "no time left"
            else:
                print(f"== {step.name} (at most {limit_s:.0f} s)", flush=True)
                self._run_step(outcome, words, limit_s)
                print(f"   {outcome.state} after {outcome.seconds:.1f} s", flush=True)
                for line in outcome.tail:
                    print(f"   | {line}", flush=True)
            self.write()

    def _run_step(self, outcome: Outcome, words: list[str], limit_s: float) -> None:
        outcome.state, started = "running", time.monotonic()
        environment = {**os.environ, **self._environment()}
        begun = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            log.write(f"\n$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                # A session of its own: what the step starts is in its group, and a ^C here is ours to pass on.
                process = subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                outcome.state, outcome.tail = "failed", [str(error)]
                return
            try:
                outcome.state = self._wait(process, started + limit_s)
            finally:
                kill_group(process)
                outcome.seconds = round(time.monotonic() - started, 1)
        if outcome.state != "ok":
            with self._log.open("rb") as log_again:
                log_again.seek(begun)
                text = log_again.read().decode(errors="replace")
            outcome.tail = text.splitlines()[-TAIL_LINES:]

    def _wait(self, process: subprocess.Popen[bytes], end: float) -> State:
        written = time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            if self._stopped or now >= end:
                return "interrupted" if self._stopped else "timed out"
            if now >= written + WRITE_EVERY_S:
                self.write()
                written = now
            time.sleep(POLL_S)
        return "ok" if process.returncode == 0 else "failed"

    def _environment(self) -> dict[str, str]:
        own = [self._values.get("site", ""), *(str(ROOT / name) for name in PATHS), os.environ.get("PYTHONPATH", "")]
        return {
            "PYTHONPATH": os.pathsep.join(filter(None, own)),
            "PYTHONUNBUFFERED": "1",
            "TRITON_CACHE_DIR": self._values["cache"],
            VARIABLE: str(self._outcomes_file),
        }

    def result(self) -> dict[str, Any]:
        """All that is known, as it is written."""
        figures = _read(Path(self._values["figures"]))
        outcomes = read_outcomes(self._outcomes_file)
        sections = figures.get("sections", {})
        return {
            "check": self._name,
            "dry": self._dry,
            "machine": _read(Path(self._values["machine"])),
            "goals": {} if self._dry else {text: asdict(found) for text, found in judge(sections, outcomes).items()},
            "steps": {name: asdict(outcome) for name, outcome in self.done.items()},
            "tests": outcomes,
            "figures": sections,
        }

    def write(self) -> Path:
        """Write the result and the log beside it. Returns the result's file, which moves once the card is known."""
        result = self.result()
        folder = self._output / slug(result["machine"].get("device") or "unknown-card")
        file = folder / f"{self._name}.json"
        partial = file.with_suffix(".partial")
        write_json(partial, result)
        partial.replace(file)
        if self._log.exists():
            shutil.copyfile(self._log, file.with_suffix(".log"))
        if self._file is not None and self._file != file:
            self._file.unlink()
            self._file.with_suffix(".log").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds another run's
                self._file.parent.rmdir()
        self._file = file
        return file


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a step. What hangs in a driver's call may outlive it; nobody waits for that."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(2)


def summary(result: Mapping[str, Any]) -> list[str]:
    """The lines that end a check."""
    machine, lines = result["machine"], []
    lines.append(f"{result['check']} on {machine.get('device', 'an unknown card')}: {machine}")
    lines += [f"  {step['state']:<12} {step['seconds']:6.1f} s  {name}" for name, step in result["steps"].items()]
    if result["dry"]:
        return [*lines, "a dry run: it shows that the steps run, and measures nothing"]
    return [*lines, *(f"  {goal['verdict']:<12} {goal['found']:<22} {text}" for text, goal in result["goals"].items())]


def _read(file: Path) -> dict[str, Any]:
    """What a step has written so far; each writes its file whole, or not at all."""
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
