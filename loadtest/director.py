"""Starts a run in all its processes, adds up what they count, and ends it with the report and the exit code."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from dataclasses import replace
from typing import Any

import gevent
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from .generator import Generator, Plan
from .interface import FAILED, MISSED, VIEW_FD
from .outcome import Outcome, judge
from .record import RequestFailed
from .scrape import Scraper
from .settings import Settings
from .statistics import Statistics
from .streams import Ask, stream_for

logger = logging.getLogger("loadtest")
BEGIN, PROGRESS = "flashserve_begin", "flashserve_progress"
START_AHEAD_S = 0.5  # between the plan and the first arrival, for the message to reach every process
PROGRESS_S = 1.0
VIEW_SECONDS = 10
STOPPING_S = 5.0  # for the last counts of all processes after Ctrl-C
LOST_S = 15.0  # after the latest possible end: a process that has not reported by then is lost
PROBE_CHARS = 1200


def install(environment: Any, settings: Settings) -> Generator | None:
    """Once per process, from Locust's `init` event. Returns the generator of a process that sends."""
    runner = environment.runner
    generator = None if isinstance(runner, MasterRunner) else Generator(environment, settings)
    if isinstance(runner, WorkerRunner):
        _join(runner, generator)
    else:
        director = Director(environment, settings, generator)
        environment.events.test_start.add_listener(director.on_test_start)
        environment.events.test_stop.add_listener(director.on_test_stop)
        environment.events.quitting.add_listener(director.on_quitting)
        if isinstance(runner, MasterRunner):
            runner.register_message(PROGRESS, director.on_progress)
        if environment.web_ui is not None:
            from .web import extend_web_ui  # what it needs comes with Locust's page

            extend_web_ui(environment.web_ui, lambda: director.total)
    return generator


def _join(runner: Any, generator: Any) -> None:
    """A worker: begins when it is told to, and reports every second."""

    def report() -> None:
        while True:
            over = generator.done.wait(PROGRESS_S)
            runner.send_message(PROGRESS, generator.take_pending())
            if over:
                return

    def on_begin(environment: Any, msg: Any, **_: Any) -> None:
        generator.begin(Plan(**msg.data))
        gevent.spawn(report)

    runner.register_message(BEGIN, on_begin)
    runner.environment.events.test_stop.add_listener(lambda **_: generator.stop())


class Director:
    """In the master, or in the only process."""

    def __init__(self, environment: Any, settings: Settings, generator: Generator | None) -> None:
        self.environment = environment
        self.settings = settings
        self.generator = generator
        self.total = Statistics()
        self._view = _open_view()
        self._running = False

    # --- start ---------------------------------------------------------------------------------------------

    def on_test_start(self, **_: Any) -> None:
        self.total, self._active, self._done = Statistics(), {}, set()  # type: ignore[var-annotated]
        self.began = time.time()
        try:
            chars_per_token = self._probe()
        except RequestFailed as error:
            logger.error("no load: %s (%s)", error.message, error.kind)
            self.environment.process_exit_code = FAILED
            gevent.spawn(self.environment.runner.quit)
            return
        runner = self.environment.runner
        self._scraper = Scraper(self.settings.metrics_url, self.settings.model)
        # A fixed seed would find its prompts in the prefix cache of a server that has seen them before.
        self.seed = random.randrange(2**31) if self.settings.seed is None else self.settings.seed
        self.start = time.time() + START_AHEAD_S
        self._running = True
        if isinstance(runner, LocalRunner):
            self._shares = 1
            assert self.generator is not None  # only a master has none
            self.generator.begin(Plan(self.start, 0, 1, chars_per_token, self.seed))
        else:
            clients = [client.id for client in runner.clients.ready + runner.clients.running + runner.clients.spawning]
            self._shares = len(clients)
            for share, client in enumerate(clients):
                plan = Plan(self.start, share, self._shares, chars_per_token, self.seed)
                runner.send_message(BEGIN, plan.to_json(), client_id=client)
        self._greenlets = [gevent.spawn(self._watch), gevent.spawn(self._scraper.run, self.start)]

    def _probe(self) -> float:
        """Asks every target once, so that what is wrong is said before any load; returns characters per token."""
        chars_per_token = self.settings.workload.chars_per_token
        text = self.settings.workload.corpus[:PROBE_CHARS]
        for target in self.settings.targets:
            stream = stream_for(target, self.settings.model)
            record = stream.measure(Ask(text, 1, self.settings.workload.params, 60.0))
            stream.close()
            if record.error is not None:
                raise RequestFailed(record.error, f"{target.url}: {record.message}")
            if record.prompt_tokens:
                chars_per_token = len(text) / record.prompt_tokens
        return chars_per_token

    # --- while it runs -------------------------------------------------------------------------------------

    def on_progress(self, environment: Any, msg: Any, **_: Any) -> None:
        """A worker's message."""
        self._add(msg.node_id, msg.data)

    def _add(self, node: str, data: dict[str, Any]) -> None:
        self.total.merge(Statistics.from_json(data["statistics"]))
        self._active[node] = data["active"]
        if data["done"]:
            self._done.add(node)

    def _collect(self) -> None:
        if self.generator is not None:
            data = self.generator.take_pending()
            self.total.merge(Statistics.from_json(data["statistics"]))
            self._active["local"] = data["active"]
            if data["done"]:
                self._done.add("local")

    def _watch(self) -> None:
        latest = self.start + self.settings.schedule.end_s + self.settings.drain_s + LOST_S
        while len(self._done) < self._shares and time.time() < latest:
            gevent.sleep(PROGRESS_S)
            self._collect()
            self._show()
        self._finish()
        runner = self.environment.runner
        if self.environment.parsed_options.headless:
            runner.quit()
        else:  # the web page stays, for another run
            runner.stop()

    def _show(self) -> None:
        if self._view is not None:
            now = time.time() - self.start
            # All seconds of an hour would be two megabytes, each second.
            recent = {at: second for at, second in self.total.seconds.items() if at > now - VIEW_SECONDS}
            state = {
                "now": now,
                "active": sum(self._active.values()),
                "statistics": replace(self.total, seconds=recent).to_json(),
                "server": self._scraper.samples[-1:],
            }
            try:
                self._view.write(json.dumps(state) + "\n")
                self._view.flush()
            except OSError:  # whoever started this run to look at it has gone
                self._view = None
                logger.warning("nobody looks any more: the run ends")
                self.environment.runner.quit()

    # --- end -----------------------------------------------------------------------------------------------

    def on_test_stop(self, **_: Any) -> None:
        """The run's own end, or Ctrl-C before it."""
        if self._running:
            if self.generator is not None:
                self.generator.stop()
            deadline = time.time() + STOPPING_S
            while len(self._done) < self._shares and time.time() < deadline:
                gevent.sleep(0.05)
                self._collect()
            self._finish()

    def on_quitting(self, **_: Any) -> None:
        """Ctrl-C: before the exit code is read, so the report comes first."""
        if self._running:
            self.environment.runner.stop()  # fires test_stop

    def _finish(self) -> None:
        if not self._running:
            return
        self._running = False
        self._collect()
        self._scraper.stop()
        outcome = Outcome(
            settings=self.settings,
            statistics=self.total,
            server=self._scraper.samples,
            began=self.began,
            seed=self.seed,
            lasted_s=time.time() - self.start,
            processes=self._shares,
            lost_processes=self._shares - len(self._done),
            users=0 if self.settings.is_open else int(self.environment.runner.target_user_count),
        )
        missed = judge(outcome)
        for line in missed:
            logger.warning("objective missed: %s", line)
        if missed:
            self.environment.process_exit_code = MISSED
        elif not outcome.statistics.whole.counts["finished"]:
            logger.error("not one request was answered")
            self.environment.process_exit_code = FAILED
        else:
            self.environment.process_exit_code = 0
        from .report import write_report  # draws with matplotlib, which takes a second to load

        logger.info("report: %s", write_report(outcome))


def _open_view() -> Any:
    try:
        return os.fdopen(int(os.environ[VIEW_FD]), "w", encoding="utf-8")
    except (KeyError, ValueError, OSError):
        return None
