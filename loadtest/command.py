"""`flashserve bench`: a load test from one command, with a view in the terminal and a report."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any

from flashserve_client import Client, FlashserveError, InvalidRequest
from flashserve_client.cli import choose_model, explain

from .interface import BAD_OPTIONS, DEFAULT_TARGET, FAILED
from .invocation import DEFAULT_USERS, locust_words
from .search import parse_range
from .settings import add_options, settings_from
from .streams.choose import FORMS, Target

EXAMPLES = """\
examples:
  flashserve bench                                          4 users for a minute against the server's default model
  flashserve bench http://gpu-box:8000 --model qwen --users 64 --output-tokens uniform:64-256
  flashserve bench --rate 10 --p99-ttft 500 --p99-itl 80    open loop; exit code 3 if an objective is missed
  flashserve bench --rate 2-40@120 --arrivals gamma:0.5     a ramp of bursts
  flashserve bench --users 8 --turns 4 --think-time 2       conversations, whose requests repeat what was said
  flashserve bench --search 1-100 --p99-ttft 500            the highest rate within that
  flashserve bench 'grpc://localhost:8001*3' http://localhost:9000/v1   two protocols, three to one

exit codes: 0, 1 no load could be made, 2 wrong options, 3 an objective was missed
"""


def add_commands(subparsers: Any) -> None:
    """Registers bench, which sets `run` to a function from the parsed arguments to an exit code."""
    bench = subparsers.add_parser(
        "bench",
        help="load a running server, and report latencies and throughput",
        description="Load a running server with streams, and report latencies and throughput.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument(
        "url", nargs="*", metavar="URL",
        help=f"{FORMS}; several are a mix, by URL*WEIGHT (default: {DEFAULT_TARGET}, or $FLASHSERVE_URL)",
    )  # fmt: skip
    bench.add_argument(
        "--users", type=_count, metavar="N", help=f"closed loop: users that wait for answers (default: {DEFAULT_USERS})"
    )
    bench.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="share the load among N processes (default: 1)"
    )
    bench.add_argument(
        "--search", type=_range, metavar="LOW-HIGH",
        help="run again and again for the highest rate that meets the objectives, to 5%%; each run lasts --duration",
    )  # fmt: skip
    add_options(bench)
    bench.set_defaults(run=run_bench)


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number from 1 to 100000")
    return int(text)


def run_bench(args: argparse.Namespace) -> int:
    """`flashserve bench`."""
    urls = args.url or [os.environ.get("FLASHSERVE_URL", DEFAULT_TARGET)]
    if (args.rate or args.trace) and args.users is not None:
        return fail("--users is for a closed loop: leave it out, or --rate and --trace", BAD_OPTIONS)
    searched = _why_not_search(args) if args.search else None
    if searched:
        return fail(searched, BAD_OPTIONS)
    try:
        settings = settings_from(args, urls)
        if settings.report is not None:  # now, and not after a run of an hour
            settings.report.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        return fail(str(error), BAD_OPTIONS)
    missing = [name for name in ("locust", "matplotlib", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        return fail(f"bench needs {', '.join(missing)}: pip install 'flashserve[loadtest]'", FAILED)
    try:
        args.model = args.model or find_model(settings.targets)
        settings = settings_from(args, urls)
    except ValueError as error:  # a URL that only the client looks at
        return fail(str(error), BAD_OPTIONS)
    except FlashserveError as error:
        return fail(explain(error, urls[0]), BAD_OPTIONS if isinstance(error, InvalidRequest) else FAILED)
    from .live import watch_run

    if args.search:
        from .trials import run_search

        return run_search(args, urls)
    return watch_run(locust_words(args, urls), settings)


def find_model(targets: Sequence[Target]) -> str | None:
    """The model that a server of Triton's protocols has ready, by the rule of `flashserve generate`; None: there is no
    such server among the targets. Raises FlashserveError."""
    triton = next((target for target in targets if target.protocol != "openai"), None)
    if triton is None:
        return None
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else it logs a line where nobody listens
    with Client(triton.url) as client:
        return choose_model(client, None)


def _range(text: str) -> tuple[float, float]:
    try:
        return parse_range(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _why_not_search(args: argparse.Namespace) -> str | None:
    """What is wrong with a search by these options; sets the rate that its first run has."""
    for name in ("rate", "trace", "users"):
        if getattr(args, name) is not None:
            return f"--search and --{name} exclude each other"
    if args.p99_ttft is None:
        return "--search needs --p99-ttft: a server that is asked too much shows it there"
    args.rate = repr(args.search[0])
    return None


def fail(message: str, code: int) -> int:
    """Prints an error and returns the exit code."""
    print(f"flashserve: {message}", file=sys.stderr)
    return code
