"""The ``flashserve`` command. Subcommands live beside what they start, and import it only when they run."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from io import TextIOWrapper

from flashserve import __version__
from flashserve.errors import FlashserveError
from flashserve.launcher.errors import LauncherError

INTERRUPTED = 130  # 128 + SIGINT, as shells count

# Each has add_commands(subparsers), which sets `run` to a function from the parsed arguments to an exit code.
COMMAND_MODULES = (
    "flashserve.launcher.commands",
    "flashserve.warm",
    "flashserve_client.cli",
    "flashserve_gateway.command",
    "loadtest.command",
)

EXAMPLES = """\
examples:
  flashserve doctor                       is everything there?
  flashserve serve                        start a server
  flashserve chat                         talk with its model
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="flashserve",
        description="An LLM backend for NVIDIA Triton Inference Server.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flashserve {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMAND_MODULES:
        import_module(name).add_commands(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. What follows ``--`` is left to the subcommand as ``rest``."""
    _prepare_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    parsed = build_parser().parse_args(words[:split])
    parsed.rest = words[split + 1 :]
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        status = run(parsed)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` has seen enough; Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except LauncherError as error:
        return _fail(str(error), error.advice)
    except (FlashserveError, OSError, UnicodeError) as error:  # a file that is not there, not ours, or not text
        return _fail(str(error))


def _prepare_streams() -> None:
    """Whatever the terminal or pipe can take: characters that it lacks are replaced, a closed one takes nothing."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "w" if number else "r", encoding="utf-8"))
        elif isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str, advice: str = "") -> int:
    print(f"flashserve: error: {message}", *([f"  → {advice}"] if advice else []), sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
