"""What a step of scheduler and block manager costs, with up to 4,096 running and 100,000 waiting requests.

Decode steps on a runner that computes nothing, its own time included, and what one arrival with its abort costs. Linear
means that the microseconds per request and step stay about the same down the table, and do not depend on how many wait.
"""

from __future__ import annotations

import argparse
import time

from benchmarks.common.arguments import numbers
from benchmarks.common.results import rounded
from benchmarks.common.tables import markdown
from benchmarks.common.timing import wall_seconds
from benchmarks.engine.core import PARAMS, make_core, time_decodes
from flashserve.protocol import Abort, GenerateRequest

PROMPT = 32
ARRIVALS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=numbers, default=[64, 256, 1024, 4096], help="default: 64,256,1024,4096")
    parser.add_argument("--waiting", type=numbers, default=[1, 1000, 100_000], help="default: 1,1000,100000")
    parser.add_argument("--steps", type=int, default=200, help="decode steps to time (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    rows = [
        ["running", "waiting", "ms per step, median", "99th percentile", "µs per request and step", "µs per arrival"]
    ]
    figures = []
    for running in args.running:
        for waiting in args.waiting:
            found = rounded(_measure(running, waiting, args.steps))
            figures.append(found)
            print(
                f"{running} running, {waiting} waiting: {found['us_per_request']} µs per request and step", flush=True
            )
            keys = ("median_ms", "p99_ms", "us_per_request", "us_per_arrival")
            rows.append([f"{running:,}", f"{waiting:,}", *(f"{found[key]:.2f}" for key in keys)])
    each = [found["us_per_request"] for found in figures]
    print("", *markdown(rows), sep="\n")
    print(
        f"\nµs per request and step: {min(each)} to {max(each)}, a factor of {max(each) / min(each):.1f} over the table"
    )


def _measure(running: int, waiting: int, steps: int) -> dict[str, float]:
    core = make_core(running, PROMPT, steps, waiting)
    figures = time_decodes(core, running, steps, core.step)
    first = running + waiting

    def arrive_and_leave() -> None:
        """Each newcomer is aborted again, so the queue stays as long as it is."""
        for number in range(first, first + ARRIVALS):
            prompt = [(number + i) % 500 for i in range(PROMPT)]
            core.handle(GenerateRequest(number, prompt, PARAMS, arrival=time.monotonic()))
            core.handle(Abort([number]))

    return {"running": running, "waiting": waiting, **figures,
            "us_per_arrival": 1e6 * wall_seconds(arrive_and_leave) / ARRIVALS}  # fmt: skip
