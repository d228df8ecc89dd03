"""Keeps deadlines that the engine does not, and notices an engine that lives but makes no step.

An engine that was stopped, swapped out, or waits for a device that hangs keeps its socket open, so that nothing else
tells it from one that computes. As long as it steps, its requests' deadlines are its own to keep; else they are kept
here.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from flashserve.errors import Cancelled
from flashserve.frontend.metrics import Metrics
from flashserve.frontend.responder import Responder

log = logging.getLogger(__name__)

POLL_S = 0.1
STOP_TIMEOUT_S = 2.0
# What the engine has to answer sooner: it keeps deadlines between two steps, and says how far it had come.
DEADLINE_SLACK_S = 0.5
REPORT_S = 10.0
RESTART_S = 60.0
# On a CPU one step of a long prompt may take minutes. That costs the processor's time, which waiting does not.
RESTART_BUSY_S = 1800.0
BUSY_SHARE = 0.05


class Engine(Protocol):
    """What the supervisor knows of the engine."""

    @property
    def pid(self) -> int | None: ...

    @property
    def silent_s(self) -> float: ...

    def restart(self, reason: str) -> None: ...


class EngineWatch:
    """Owns one thread."""

    def __init__(
        self,
        responder: Responder,
        engine: Engine,
        metrics: Metrics,
        report_s: float = REPORT_S,
        restart_s: float = RESTART_S,
    ) -> None:
        """Without a step for ``report_s`` the gauge and the log tell; for ``restart_s``, the engine is ended."""
        self._responder = responder
        self._engine = engine
        self._metrics = metrics
        self._report_s = report_s
        self._restart_s = restart_s
        self._stalled = False
        self._engine_seconds_before = 0.0
        """The processor's time that the engine had used when it was last heard of."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        while not self._stopping.wait(POLL_S):
            try:
                self._keep_deadlines()
                self._look_at_engine()
            except Exception:
                log.exception("the engine could not be looked at")

    def _keep_deadlines(self) -> None:
        latest = time.monotonic() - DEADLINE_SLACK_S
        for generation in self._responder.open_requests:
            deadline = generation.message.deadline
            if deadline is not None and deadline < latest and not generation.inbox.failed:
                self._responder.fail(generation, Cancelled("the request's deadline has passed", reason="deadline"))

    def _look_at_engine(self) -> None:
        silent_s, pid = self._engine.silent_s, self._engine.pid
        if silent_s < 1.0 or pid is None:
            self._engine_seconds_before = processor_seconds(pid) if pid is not None else 0.0
        if self._stalled != (silent_s >= self._report_s):
            self._stalled = not self._stalled
            self._metrics.set("flashserve:engine_stalled", int(self._stalled))
            if self._stalled:
                log.error("the engine (process %s) has work but has made no step for %.0f s", pid, silent_s)
            else:
                log.warning("the engine makes steps again, or has no work any more")
        if silent_s >= self._restart_s and pid is not None:
            used = processor_seconds(pid) - self._engine_seconds_before
            if used < BUSY_SHARE * silent_s or silent_s >= RESTART_BUSY_S:
                self._engine.restart(f"made no step for {silent_s:.0f} s and was ended")


def processor_seconds(pid: int) -> float:
    """What a process has used so far; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
