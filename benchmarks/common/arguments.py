"""Command lines: one way to write them."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from types import ModuleType

CACHE = Path("~/.cache/flashserve/peers").expanduser()
"""Where models with random weights and the peers' environments are kept."""
CORES = len(os.sched_getaffinity(0))


def new_parser(doc: str | None, program: str) -> argparse.ArgumentParser:
    """A parser whose description is a module's docstring, as it is written."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{program}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def numbers(text: str) -> list[int]:
    """ "1,16,64" → [1, 16, 64]"""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 1,16,64") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError("numbers must be positive")
    return values


def model_folder(text: str) -> Path:
    """A model's folder, or a shape's name: that model is made with random weights, once."""
    from benchmarks.common.random_model import make_random_model
    from benchmarks.common.shapes import CPU_SHAPES

    if text in CPU_SHAPES:
        return make_random_model(text)
    if not Path(text, "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a model's folder nor one of {', '.join(CPU_SHAPES)}")
    return Path(text).resolve()


def run_parts(doc: str | None, program: str, parts: dict[str, ModuleType]) -> None:
    """Run one part of a question. Each is a module with ``add_arguments(parser)`` and ``run(args)``."""
    parser = new_parser(doc, program)
    subparsers = parser.add_subparsers(dest="part", required=True, metavar="PART")
    for name, module in parts.items():
        text = str(module.__doc__)
        part = subparsers.add_parser(
            name, help=text.split("\n")[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(part)
    args = parser.parse_args()
    try:
        parts[args.part].run(args)
    except KeyboardInterrupt:
        sys.exit("interrupted")
