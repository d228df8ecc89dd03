"""The ``flashserve`` command. Subcommands live beside what they start, and import it only when they run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from flashserve import __version__

# Each has add_commands(subparsers), which sets `run` to a function from the parsed arguments to an exit code.
COMMAND_MODULES = ("flashserve.launcher.commands", "flashserve_client.cli", "loadtest.command")

EXAMPLES = """\
examples:
  flashserve doctor                       is everything there?
  flashserve serve                        start a server
  flashserve generate "def fibonacci(n):"  ask it
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
    words = list(sys.argv[1:] if arguments is None else arguments)
    split = words.index("--") if "--" in words else len(words)
    parsed = build_parser().parse_args(words[:split])
    parsed.rest = words[split + 1 :]
    run: Callable[[argparse.Namespace], int] = parsed.run
    return run(parsed)


if __name__ == "__main__":
    sys.exit(main())
