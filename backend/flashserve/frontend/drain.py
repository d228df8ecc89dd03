"""Notices an unload or a shutdown while requests run, and bounds what they get to finish.

Triton calls ``finalize`` only after a model's last request has ended, so nothing could bound it there. The model's
readiness on the server's own HTTP endpoint turns 400 after an unload, and the connection is refused after SIGTERM.
(``pb_utils.is_model_ready`` would ask the same, but crashed or hung the server while it started or stopped.)
The launcher says sooner that everything ends, by a file, and how much time there is.
"""

from __future__ import annotations

import http.client
import logging
import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from flashserve.errors import Cancelled, Unavailable
from flashserve.frontend.responder import Responder
from flashserve.stub_processes import ENDING_VARIABLE
from flashserve.triton_http import ask

log = logging.getLogger(__name__)

POLL_S = 0.25
ENDING_POLL_S = 0.1  # for the launcher's file: 10 µs each
READY_POLL_S = 0.02  # an unload that comes before the model was seen ready goes unnoticed
TIMEOUT_S = 2.0
# Triton 2.51 loses a request whose gRPC client cancels within a millisecond of its end, for instance one that leaves
# its loop at the finish reason. It then waits for that request for ever and never calls finalize.
FINALIZE_TIMEOUT_S = 3.0
CONFIRMATIONS = 2  # polls in a row that must agree: one refused connection may be an overload


class DrainWatcher:
    """Polls while it lives. Starts to draw conclusions once it has seen the model ready."""

    def __init__(
        self,
        model_name: str,
        version: str,
        address: str | None,
        drain_timeout_s: float,
        responder: Responder,
        stop_engine: Callable[[], None],
    ) -> None:
        """``stop_engine`` is called once nothing may run any more."""
        self._path = f"/v2/models/{model_name}/versions/{version}/ready"
        self._address = address or os.environ.get("FLASHSERVE_TRITON_HTTP") or address_of(os.getppid())
        self._drain_timeout_s = drain_timeout_s
        self._responder = responder
        self._stop_engine = stop_engine
        ending = os.environ.get(ENDING_VARIABLE)
        self._ending = Path(ending) if ending else None
        self.draining = False
        """The model is being unloaded: what its engine does from now on is no fault."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drain", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join(TIMEOUT_S)

    def _run(self) -> None:
        if self._poll_until(ready=True, times=1, period_s=READY_POLL_S) and self._poll_until(
            ready=False, times=CONFIRMATIONS, period_s=POLL_S
        ):
            self._drain()

    def _poll_until(self, *, ready: bool, times: int, period_s: float) -> bool:
        """Poll until so many answers in a row agree, or the launcher ends everything; False when stopped before."""
        agreeing = 0
        while not self._wait(period_s):
            if self._ending_by() is not None:
                return True
            agreeing = agreeing + 1 if self._is_ready() is ready else 0
            if agreeing == times:
                return True
        return False

    def _wait(self, period_s: float) -> bool:
        """Until the next question to Triton, looking for the launcher's file meanwhile; True when stopped."""
        end = time.monotonic() + period_s
        while not self._stopping.wait(min(ENDING_POLL_S, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end or self._ending_by() is not None:
                return False
        return True

    def _ending_by(self) -> float | None:
        """When requests must have ended because the launcher ends everything; None while it does not."""
        if self._ending is None:
            return None
        try:
            return float(self._ending.read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def _is_ready(self) -> bool | None:
        """None for whatever says nothing about the model: an overload, or no port or descriptor left to ask with."""
        try:
            status, _ = ask(self._address, "GET", self._path, timeout_s=TIMEOUT_S)
        except ConnectionError:  # refused, or, as long as Triton still has a stream open, accepted and reset
            return False
        except (OSError, http.client.HTTPException):
            return None
        return {200: True, 400: False, 404: False}.get(status)

    def _drain(self) -> None:
        self.draining = True
        count = len(self._responder.open_requests)
        end = time.monotonic() + self._drain_timeout_s
        ending_by = self._ending_by()
        if ending_by is not None:
            end = min(end, ending_by)
        log.info("the model is being unloaded: %d requests get %.1f s to finish", count, end - time.monotonic())
        self._responder.refuse_new(Unavailable("the model is being unloaded", retry_after_ms=2000))
        while self._responder.open_requests and time.monotonic() < end:
            if self._stopping.wait(0.05):
                return
        remaining = self._responder.open_requests
        if remaining:
            log.warning("%d requests did not finish in time and end with CANCELLED", len(remaining))
        self._end_requests()

    def _end_requests(self) -> None:
        """Until stopped: a request that was parsed during the drain must not survive it."""
        self._responder.fail_all(_UNLOADED)
        self._stop_engine()  # one that hangs takes no aborts, for which the sender would wait with the FINAL flags
        deadline = time.monotonic() + FINALIZE_TIMEOUT_S
        while not self._stopping.wait(POLL_S):
            self._responder.fail_all(_UNLOADED)
            # One whose end is still on its way gets as long again.
            late_s = time.monotonic() - deadline
            if late_s > (FINALIZE_TIMEOUT_S if self._responder.open_requests else 0):
                log.warning("Triton does not finalize this model, although all its requests have ended: ending anyway")
                os._exit(0)


def address_of(server: int) -> str:
    """Where the tritonserver with this process id listens for HTTP, from its command line."""
    try:
        words = Path(f"/proc/{server}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        words = []
    options = {"--http-address": "localhost", "--http-port": "8000"}
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in options:
            options[name] = value if equals else following
    host, port = options.values()
    return f"{'localhost' if host in ('0.0.0.0', '::') else host}:{port}"


_UNLOADED = Cancelled("the model was unloaded", reason="shutdown")
