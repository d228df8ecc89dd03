"""Everything to be known of the GPU path, in the minutes for which a machine is lent: one command, in two stages.

    python -m benchmarks.gpu_check.wheels wheels                   # before, where there is a network
    python -m benchmarks.gpu_check --stage 1 --wheels wheels       # 300 s at most: is it right, what does 8B reach?
    python -m benchmarks.gpu_check --stage 2 --wheels wheels --archive benchmarks/results/<card>/stage-1.tar.gz
    python -m benchmarks.gpu_check --stage 1 --dry                 # no GPU: do the steps run?

A machine needs torch, triton and numpy, no network, and no weights; what else is imported comes from the wheels. Each
step runs under its own limit, so that one that hangs loses itself alone. The result is written while it grows, to
benchmarks/results/<card>/<date>-stage-N.json, with a log beside it, and stage 1 packs the compiled kernels for stage 2.
Ends with each goal met, missed or not measured; the exit status says whether all steps ran.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import new_parser
from benchmarks.common.results import ROOT
from benchmarks.gpu_check.runner import Check, summary
from benchmarks.gpu_check.steps import STAGE_LIMITS_S, STEPS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "gpu_check")
    parser.add_argument("--stage", type=int, default=1, choices=sorted(STAGE_LIMITS_S))
    parser.add_argument("--dry", action="store_true", help="without a GPU, kernels in Triton's interpreter, in seconds")
    parser.add_argument("--wheels", type=Path, help="a folder that benchmarks.gpu_check.wheels made")
    parser.add_argument("--archive", type=Path, help="compiled kernels of another run, to begin with")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for <card>/…")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    work = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        if args.archive:
            shutil.unpack_archive(args.archive, work, filter="data")
        return run_stage(args.stage, args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def run_stage(stage: int, args: argparse.Namespace, work: Path) -> int:
    """0 if all its steps ran, else 1."""
    folder = work / f"stage-{stage}"
    folder.mkdir()
    cache = work / "cache"  # where the archive has it
    cache.mkdir(exist_ok=True)
    values = {
        "python": sys.executable,
        "site": str(work / "site"),
        "scratch": str(folder / "scratch"),
        "figures": str(folder / "figures.json"),
        "machine": str(folder / "machine.json"),
        "cache": str(cache),
        "archive": str(folder / "kernels"),
        "work": str(work),
    }
    if args.wheels:
        values["wheels"] = str(args.wheels.resolve())
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-stage-{stage}{'-dry' if args.dry else ''}"
    steps = [step for step in STEPS if step.stage == stage]
    check = Check(steps, values, folder, args.output, name, dry=args.dry)
    for number in (signal.SIGINT, signal.SIGTERM):  # ^C, or a lease that ends
        signal.signal(number, check.stop)
    check.run(STAGE_LIMITS_S[stage])
    file, result = check.write(), check.result()
    _keep_archive(folder / "kernels.tar.gz", file)
    print("\n".join([*summary(result), f"wrote {file}"]), flush=True)
    return 0 if all(_ran(step) for step in result["steps"].values()) else 1


def _ran(step: dict[str, Any]) -> bool:
    return step["state"] in ("ok", "left out")


def _keep_archive(archive: Path, result: Path) -> None:
    if archive.is_file():
        shutil.copyfile(archive, result.with_suffix(".tar.gz"))


if __name__ == "__main__":
    sys.exit(main())
