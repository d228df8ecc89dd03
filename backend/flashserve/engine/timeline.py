"""The last steps and requests of an engine, as a trace that chrome://tracing and ui.perfetto.dev show.

It is always recorded, so that what has just gone wrong can still be looked at: a step of 64 rows costs 2-3 µs, 10,000
steps and as many requests 7.5 MB. ``flashserve trace`` (or SIGUSR2 to the engine) writes it: 11 MB in 0.4 s, during
which the engine makes no step.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from flashserve.protocol import Stats, TokenOutput
from flashserve.scheduling.output import SchedulerOutput

log = logging.getLogger(__name__)

CAPACITY = 10_000
STEPS, REQUESTS = 1, 2  # the trace's two processes


class Timeline:
    """Ring buffers of steps and requests. The engine's only thread writes them."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._steps: deque[tuple[int, int, float, float, Stats]] = deque(maxlen=capacity)
        self._requests: deque[TokenOutput] = deque(maxlen=capacity)

    def add_step(self, plan: SchedulerOutput, started: float, ended: float, stats: Stats) -> None:
        """A step from its planning to its samples, monotonic seconds; a step that ran ahead to those of the former."""
        self._steps.append((len(plan.rows), plan.num_tokens, started, ended, stats))

    def add_ends(self, outputs: list[TokenOutput]) -> None:
        """Those of the outputs that end a request, or one of its samples."""
        for output in outputs:
            if output.finish_reason is not None and output.timings is not None:
                self._requests.append(output)

    def write(self, path: Path) -> None:
        """Write the trace, in one piece: whoever waits for the file finds it whole. A full disk is only logged."""
        try:
            self._write(path)
        except Exception as error:  # in a signal's handler: it must not end the engine
            log.error("the trace could not be written: %s", error)

    def _write(self, path: Path) -> None:
        descriptor, unfinished = tempfile.mkstemp(prefix=".trace-", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": [*self._events()]}))
        os.replace(unfinished, path)
        log.info("wrote the last %d steps and %d requests to %s", len(self._steps), len(self._requests), path)

    def _events(self) -> Iterator[dict[str, Any]]:
        for process, name in ((STEPS, "engine"), (REQUESTS, "requests")):
            yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": name}}
        former = 0.0
        for rows, tokens, started, ended, stats in self._steps:
            begin = max(started, former)  # steps that overlap, one running ahead, are shown one after the other
            former = max(ended, former)
            at = {"pid": STEPS, "tid": 1, "ts": _us(begin)}
            args = {"step": stats.steps, "rows": rows, "tokens": tokens}
            yield {**at, "ph": "X", "name": f"{rows} rows, {tokens} tokens", "dur": _us(former - begin), "args": args}
            yield {**at, "ph": "C", "name": "requests", "args": {"running": stats.running, "waiting": stats.waiting}}
            yield {**at, "ph": "C", "name": "KV blocks", "args": {"held": stats.total_blocks - stats.free_blocks}}
        for output in self._requests:
            yield from _request_events(output)


def _request_events(output: TokenOutput) -> Iterator[dict[str, Any]]:
    """A request's spans, one below the other, in a row of its own."""
    timings = output.timings
    assert timings is not None
    end = max(time for time in (timings.arrival, timings.first_scheduled, timings.last_token) if time is not None)
    args = {
        "finish_reason": output.finish_reason,
        "cached_tokens": timings.cached_tokens,
        "preemptions": timings.preemptions,
    }
    name = f"{output.request_id}.{output.index}" if output.index else output.request_id
    spans: list[tuple[str, float, float | None, dict[str, Any]]] = [
        (f"request {name}", timings.arrival, end, args),
        ("waits", timings.arrival, timings.first_scheduled, {}),
    ]
    if timings.first_scheduled is not None:
        spans.append(("prefill", timings.first_scheduled, timings.first_token, {}))
    if timings.first_token is not None:
        spans.append(("decode", timings.first_token, timings.last_token, {}))
    for span, began, ended, given in spans:
        common = {"cat": "request", "id": name, "name": span, "pid": REQUESTS, "tid": 1}
        yield {**common, "ph": "b", "ts": _us(began), "args": given}
        yield {**common, "ph": "e", "ts": _us(end if ended is None else ended)}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)
