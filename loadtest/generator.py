"""Sends a process' share of a run's requests, and counts what comes of them."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import gevent
from gevent.event import Event

from .arrivals import plan_arrivals
from .record import PLANNED, UNFINISHED, Record
from .settings import Settings
from .statistics import Statistics
from .streams import Ask, Stream, stream_for
from .workload import Conversation

# A sleep of that length that comes back late shows that the process has more to do than its core can.
LAG_PROBE_S = 0.05


@dataclass(frozen=True)
class Plan:
    """One run, as its processes are told of it."""

    start: float
    """On the clock of `time.time`, which processes share."""
    share: int
    """This process sends the requests whose number is this modulo ``shares``."""
    shares: int
    chars_per_token: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Generator:
    """Lives as long as its process; `begin` starts a run."""

    def __init__(self, environment: Any, settings: Settings) -> None:
        self.environment = environment
        self.settings = settings
        self.streams = {target.url: stream_for(target, settings.model) for target in settings.targets}
        self.pending = Statistics()
        self.begun = Event()
        self.done = Event()
        self._active: dict[Any, Record] = {}
        self._greenlets: list[Any] = []

    @property
    def active(self) -> int:
        """Requests on their way."""
        return len(self._active)

    def begin(self, plan: Plan) -> None:
        """Starts this process' share of a run."""
        self.plan = plan
        self.start = time.perf_counter() + plan.start - time.time()
        self.settings.workload.chars_per_token = plan.chars_per_token
        self.settings.workload.seed = plan.seed
        self.pending = Statistics()
        self._numbers = itertools.count(plan.share, plan.shares)
        self.done.clear()
        work = [self._watch_lag, self._end, *([self._dispatch] if self.settings.is_open else [])]
        self._greenlets = [gevent.spawn(function) for function in work]
        self.begun.set()

    def stop(self) -> None:
        """Ends a run before its time; requests that still run count as unfinished."""
        if self.begun.is_set() and not self.done.is_set():
            gevent.killall([greenlet for greenlet in self._greenlets if greenlet is not gevent.getcurrent()])
            self._finish()

    @property
    def now(self) -> float:
        """Seconds since the run's start."""
        return time.perf_counter() - self.start

    # --- open loop -----------------------------------------------------------------------------------------

    def _planned(self) -> Iterator[tuple[float, int, Ask]]:
        """This process' requests: when, number, what."""
        settings, workload = self.settings, self.settings.workload
        end = settings.schedule.end_s
        mine = slice(self.plan.share, None, self.plan.shares)
        if settings.trace is not None:
            for number, traced in itertools.islice(enumerate(settings.trace.requests), mine.start, None, mine.step):
                if traced.at_s >= end:
                    return
                asked = workload.ask(number, traced.prompt_tokens, traced.output_tokens, traced.blocks)
                yield traced.at_s, number, asked
        elif settings.rate is not None:
            # Every process draws all arrivals and takes every n-th: together they are the one process' sequence.
            times = plan_arrivals(settings.rate, settings.spacing, self.plan.seed, end)
            for number, at in itertools.islice(enumerate(times), mine.start, None, mine.step):
                yield at, number, workload.ask(number)

    def _dispatch(self) -> None:
        """Sends each request at its time. Nothing here waits for an answer."""
        for at, number, ask in self._planned():
            if (left := at - self.now) > 0:
                gevent.sleep(left)
            gevent.spawn(self.send, self.stream_of(number), ask, self.start + at)

    # --- both ----------------------------------------------------------------------------------------------

    def stream_of(self, number: int) -> Stream:
        """The target of a request, by the targets' weights; the same for the same number."""
        targets = self.settings.targets
        if len(targets) == 1:
            return self.streams[targets[0].url]
        rng = random.Random(f"target {self.plan.seed} {number}")
        (target,) = rng.choices(targets, [target.weight for target in targets])
        return self.streams[target.url]

    def send(self, stream: Stream, ask: Ask, planned: float | None = None) -> Record:
        """Runs one request and counts it."""
        me = gevent.getcurrent()
        record = stream.new_record(planned)
        self._active[me] = record
        try:
            stream.measure(ask, record)
        except gevent.GreenletExit:  # the run is over
            record.error, record.message = UNFINISHED, "it still ran when the run was over"
        finally:
            self._active.pop(me, None)
        self.pending.add(record, self.start, self.settings.schedule, self.settings.objectives)
        self._tell_locust(record)
        return record

    def wait_for_start(self) -> bool:
        """Blocks until the run begins; whether there is still time to send."""
        self.begun.wait()
        if (early := -self.now) > 0:
            gevent.sleep(early)
        return self.now < self.settings.schedule.end_s

    def next_of_closed_loop(self, stream: Stream, conversation: Conversation) -> Record | None:
        """A user's next request; None where the run's time is over."""
        workload = self.settings.workload
        if conversation.turns_left:
            gevent.sleep(workload.think_s)
        if not self.wait_for_start():
            return None
        number = next(self._numbers)
        if not conversation.turns_left:
            conversation.begin(workload.new_turns(number))
        ask = workload.ask(number, history=conversation.history)
        record = self.send(stream, ask)
        conversation.add(ask.prompt, record)
        return record

    def _tell_locust(self, record: Record) -> None:
        """Entries by name in Locust's own statistics: coarse, but its pages and files show them."""
        fire, tokens = self.environment.events.request.fire, record.output_tokens or 0
        if record.error in PLANNED:
            return  # Locust would count it as a failure
        error = None if record.error is None else RuntimeError(f"{record.error}: {record.message[:160]}")
        shared: dict[str, Any] = {"exception": None, "context": {}}
        values = {"ttft": record.ttft, "itl": record.tpot}
        for name, value in values.items():
            if value == value and error is None:
                fire(request_type=record.target, name=name, response_time=value * 1000, response_length=0, **shared)
        if error is None and (seconds := record.end - record.sent) > 0:
            # Not a time: Locust has no other column for it.
            fire(request_type=record.target, name="tokens/s", response_time=tokens / seconds, response_length=0,
                 **shared)  # fmt: skip
        fire(request_type=record.target, name="e2e", response_time=record.e2e * 1000, response_length=tokens,
             exception=error, context={})  # fmt: skip

    def _watch_lag(self) -> None:
        while True:
            before = time.perf_counter()
            gevent.sleep(LAG_PROBE_S)
            self.pending.lag.add(max(0.0, time.perf_counter() - before - LAG_PROBE_S))

    def _end(self) -> None:
        """Waits for the last answers, as long as the settings allow."""
        gevent.sleep(max(0.0, self.settings.schedule.end_s - self.now))
        limit = self.settings.schedule.end_s + self.settings.drain_s
        while self._active and self.now < limit:
            gevent.sleep(0.02)
        self._finish()

    def _finish(self) -> None:
        gevent.killall(list(self._active), block=True, timeout=5)
        for greenlet in self._greenlets:
            if greenlet is not gevent.getcurrent():
                greenlet.kill(block=False)
        self.done.set()

    def take_pending(self) -> dict[str, Any]:
        """What has been counted since the last call, for the process that adds it up."""
        pending, self.pending = self.pending, Statistics()
        return {"statistics": pending.to_json(), "active": self.active, "done": self.done.is_set()}


def is_unfinished(record: Record) -> bool:
    """Whether the run's end cut this request off."""
    return record.error == UNFINISHED
