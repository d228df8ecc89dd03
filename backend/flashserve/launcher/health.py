"""Whether a tritonserver does its work, which it shows by answering and not by existing.

One thread asks and looks; what it finds is read by the launcher's main loop, which nothing may hold up.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flashserve.launcher.control import ControlError, TritonControl
from flashserve.launcher.reloads import Reloads
from flashserve.launcher.stubs import LoadWatch, StubWatch

# Two looks confirm a stub's death, so a model is being reloaded one second after its stub died.
POLL_S = 0.5
ASK_PERIOD_S = 2.0
STOP_TIMEOUT_S = 0.5
READY, LOADING = "READY", "LOADING"
# Eight loads at once occupy all of Triton's HTTP threads, and a load may take minutes; the endpoint of the metrics has
# a thread of its own. As long as that answers, the models' list may stay away for so many times the limit.
PATIENCE_WHILE_METRICS_ANSWER = 10


@dataclass(frozen=True)
class Failure:
    """Why a life of tritonserver ends without having been asked to."""

    reason: str
    answers: bool = False
    """It still answers, so that what runs can be brought to an end."""
    is_final: bool = False
    """Starting anew cannot help: the first start failed."""


class HealthWatch:
    """Watches one life of tritonserver from the moment on at which it was ready."""

    def __init__(
        self,
        control: TritonControl,
        metrics: TritonControl,
        stubs: StubWatch,
        loads: LoadWatch,
        reloads: Reloads,
        models: Sequence[str],
        limit_s: float,
    ) -> None:
        """``models`` are ready now. ``limit_s``: after so long without an answer it is given up; 0: never."""
        self._control = control
        self._metrics = metrics
        self._reloads = reloads
        self._limit_s = limit_s
        self._stubs = stubs
        self._loads = loads
        self._states = dict.fromkeys(models, READY)
        self._failure: Failure | None = None
        self._asked = self._answered = self._metrics_answered = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """A question that is under way ends with tritonserver, or with its own bound of five seconds."""
        self._stopping.set()
        self._thread.join(STOP_TIMEOUT_S)

    @property
    def failure(self) -> Failure | None:
        """Why tritonserver has to be started anew; None as long as it works."""
        return self._failure

    @property
    def models(self) -> list[str]:
        """Those that were ready when it was asked last, and those that are being brought back."""
        ready = [name for name, state in self._states.items() if state == READY]
        return list(dict.fromkeys([*ready, *self._reloads.pending]))

    def _run(self) -> None:
        pending = self._reloads.pending
        while not self._stopping.wait(POLL_S):
            before, pending = pending, self._reloads.pending
            if time.monotonic() - self._asked >= ASK_PERIOD_S or pending != before:
                self._ask()
            if self._failure is None:
                loading = [name for name, state in self._states.items() if state == LOADING]
                stuck = self._loads.stuck(loading)
                self._failure = Failure(stuck, answers=True) if stuck is not None else None
            self._reloads.start(self._stubs.dead_models())

    def _ask(self) -> None:
        self._asked = time.monotonic()
        try:
            rows = self._control.index()
        except ControlError:
            if self._metrics.answers("/metrics"):
                self._metrics_answered = time.monotonic()
            self._judge_silence()
        else:
            # Of several versions the one that serves counts.
            states: dict[str, str] = {}
            for row in rows:
                if states.get(row["name"]) != READY:
                    states[row["name"]] = row.get("state", "")
            self._states = states
            self._answered = self._metrics_answered = time.monotonic()

    def _judge_silence(self) -> None:
        now = time.monotonic()
        silent, metrics_silent = now - self._answered, now - self._metrics_answered
        patience = self._limit_s * PATIENCE_WHILE_METRICS_ANSWER
        if self._limit_s and ((silent > self._limit_s and metrics_silent > self._limit_s) or silent > patience):
            self._failure = Failure(f"tritonserver exists, but has not answered for {silent:.0f} s")
