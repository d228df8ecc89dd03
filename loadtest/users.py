"""Locust's users. A locustfile that imports them has the options, the objectives and the report.

from locust import task
from loadtest.users import TritonGrpcUser

class Mine(TritonGrpcUser):
    @task
    def short(self):
        self.ask("def fibonacci(n):", max_tokens=16)
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import gevent
from locust import User, events
from locust.exception import StopUser

from .director import install
from .generator import Generator, is_unfinished
from .interface import BAD_OPTIONS, DEFAULT_TARGET
from .record import Record
from .settings import add_options, settings_from
from .streams import Ask, Stream
from .workload import Conversation

logger = logging.getLogger("loadtest")
generator: Generator | None = None
"""Of this process; a master has none."""


class LlmUser(User):
    """A user of a closed loop: asks, waits for the answer, asks again."""

    abstract = True
    protocol: ClassVar[str] = ""
    url: ClassVar[str] = ""

    def __init__(self, environment: Any) -> None:
        super().__init__(environment)
        self.conversation = Conversation()

    @property
    def stream(self) -> Stream:
        assert generator is not None  # masters have no users
        return generator.streams[self.url]

    def ask(self, prompt: str, max_tokens: int, history: Sequence[tuple[str, str]] = (), **params: Any) -> Record:
        """A request of one's own; it is measured like the workload's. Ends the user when the run's time is over.

        history: prompts and answers (``Record.answer``) of the conversation's earlier turns.
        """
        assert generator is not None
        if not generator.wait_for_start():
            raise StopUser
        timeout_s = generator.settings.workload.timeout_s
        record = generator.send(self.stream, Ask(prompt, max_tokens, params, timeout_s, history=tuple(history)))
        _leave_if_over(record)
        return record


class TritonGrpcUser(LlmUser):
    abstract = True
    protocol = "triton-grpc"


class TritonHttpUser(LlmUser):
    abstract = True
    protocol = "triton-http"


class OpenAIUser(LlmUser):
    abstract = True
    protocol = "openai"


def next_of_workload(user: LlmUser) -> None:
    """A task: the next request that the options describe. In an open loop requests need no users."""
    assert generator is not None
    record = None if generator.settings.is_open else generator.next_of_closed_loop(user.stream, user.conversation)
    if record is None:
        gevent.sleep(0.1)
    else:
        _leave_if_over(record)


BY_PROTOCOL: dict[str, type[LlmUser]] = {kind.protocol: kind for kind in (TritonGrpcUser, TritonHttpUser, OpenAIUser)}


def _leave_if_over(record: Record) -> None:
    if is_unfinished(record):  # this greenlet was killed while it waited, and the measuring caught it
        raise gevent.GreenletExit


@events.init_command_line_parser.add_listener
def _add_options(parser: Any, **_: Any) -> None:
    group = parser.add_argument_group("load of language models")
    group.add_argument(
        "--target", action="append", metavar="URL",
        help="grpc://HOST:8001, http://HOST:8000 (Triton) or http://HOST:PORT/v1 (OpenAI); URL*WEIGHT for a mix, "
        f"repeatable (default: --host, or {DEFAULT_TARGET})",
    )  # fmt: skip
    add_options(group)


@events.init.add_listener
def _init(environment: Any, **_: Any) -> None:
    global generator
    options = environment.parsed_options
    try:
        targets = options.target or [options.host or DEFAULT_TARGET]
        settings = settings_from(options, targets)
        _give_targets(environment, settings.targets)
    except (ValueError, OSError) as error:
        logger.error("%s", error)
        sys.exit(BAD_OPTIONS)
    generator = install(environment, settings)


def _give_targets(environment: Any, targets: Any) -> None:
    """Classes without a protocol's target go; those of `locustfile.py` get a class per target."""
    classes = [kind for kind in environment.user_classes if issubclass(kind, LlmUser)]
    chosen: list[type[LlmUser]] = []
    for index, target in enumerate(targets):
        fitting = [kind for kind in classes if issubclass(kind, BY_PROTOCOL[target.protocol])]
        if not fitting:
            raise ValueError(f"{target.url}: no user class for {target.protocol} is chosen")
        for kind in fitting:
            name = kind.__name__ if index == 0 else f"{kind.__name__}{index + 1}"
            members = {"url": target.url, "host": target.url, "weight": kind.weight * target.weight}
            chosen.append(type(name, (kind,), members))
    others = [kind for kind in environment.user_classes if not issubclass(kind, LlmUser)]
    environment.user_classes = [*chosen, *others]
