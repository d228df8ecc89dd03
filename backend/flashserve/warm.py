"""``flashserve warm``: compile a model's kernels before it is served."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

EXAMPLES = """\
examples:
  flashserve warm /models/big/1/model.json                       for the GPU of this machine
  flashserve warm /models/big/1/model.json --gpu H200 --cache /cache      where an image is built
  TRITON_CACHE_DIR=/cache flashserve serve --model-repository /models     finds them

A start with another GPU architecture, another version of torch or triton, or other settings compiles what it lacks, as
without a cache.
"""


def add_commands(subparsers: Any) -> None:
    """Register warm."""
    parser = subparsers.add_parser(
        "warm",
        help="compile a model's kernels for a GPU ahead of its start",
        description="Compile what a model's start on a GPU would compile, in parallel, into Triton's cache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="a model.json, or a model with default settings")
    parser.add_argument("--gpu", metavar="NAME", help="such as H200 or A100; the GPU of this machine without it")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="instead of TRITON_CACHE_DIR or ~/.triton/cache")
    parser.add_argument("--jobs", metavar="N", type=int, help="processes; one per core without it")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 if everything compiled, else 1."""
    from flashserve.config import EngineConfig
    from flashserve.errors import ConfigError
    from flashserve.models.registry import open_model
    from flashserve.runner.ahead import find_gpu, start_variants
    from flashserve_kernels.gpu.warm import warm

    if args.jobs is not None and args.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {args.jobs}")
    if args.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(args.cache)
    path = Path(args.model)
    config = EngineConfig.from_file(path) if path.name.endswith(".json") else _defaults(args.model)
    properties = find_gpu(args.gpu)
    started, failed, count = time.perf_counter(), 0, 0
    for found in warm(properties, start_variants(open_model(config), config, properties), args.jobs):
        count += 1
        if found.error is not None:
            failed += 1
            print(f"{found.variant.name}: {found.error}")
    seconds = time.perf_counter() - started
    print(f"{count - failed} of {count} kernels compiled for {properties.name} ({properties.arch}) in {seconds:.0f} s")
    return 1 if failed else 0


def _defaults(model: str) -> Any:
    from flashserve.config import EngineConfig

    return EngineConfig.from_mapping({"model": model}, Path.cwd())
