"""Everything about one GPU in one command: ceilings, kernels, decode, prefill, throughput, idle time, peers.

    python -m benchmarks.gpu                                  # 8 minutes at most; needs no network and no weights
    python -m benchmarks.gpu --sections ceilings attention --budget-s 120
    python -m benchmarks.gpu --device cpu --tiny              # does the benchmark itself work?

Weights are random and made on the device. The result is printed, and written after every figure to
benchmarks/gpu/results/<gpu>/<date>.json, so that a run that is cut short keeps what it has. A section that fails says
so there and ends nothing else; where it leaves the device unusable, a new process does the rest. Kernels are compared
with float64, with torch's own ops, and with the ceilings, which are measured first.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import new_parser
from benchmarks.common.results import ROOT, result_folder, slug
from benchmarks.common.shapes import GPU_SHAPES, SHAPES, TINY_SHAPE
from benchmarks.common.tables import keyed
from benchmarks.gpu.report import TARGETS, Budget, Report

# A lent machine may have torch and nothing of ours.
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "kernels")]

KERNEL_SECTIONS = ("attention", "kernels", "products")
TABLES = (*KERNEL_SECTIONS, "yardsticks")
SECTIONS = ("ceilings", *TABLES, *GPU_SHAPES, "transformers")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "gpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=460.0, help="seconds; what does not fit is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="the kernels'")
    parser.add_argument("--tiny", action="store_true", help="numbers that a CPU and Triton's interpreter can bear")
    parser.add_argument("--output", type=Path, default=result_folder("gpu"), help="folder for the result")
    parser.add_argument("--resume", type=Path, help="go on with this result file; it is made where it is not there")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    if args.device == "cpu":  # kernels in Triton's interpreter, models on torch's ops
        os.environ |= {"TRITON_INTERPRET": "1", "FLASHSERVE_KERNELS": "torch"}
    import torch

    from benchmarks.common.timing import Timer, device_facts

    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU; --device cpu --tiny tries the benchmark itself", file=sys.stderr)
        return 1
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timer = Timer(device, seconds=0.0, least=1) if args.tiny else Timer(device)
    budget, say = Budget(args.budget_s), partial(print, flush=True)
    if args.resume and args.resume.exists():
        report = Report.resume(args.resume, say)
    else:
        facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "dtype": args.dtype, **device_facts(device)}
        file = args.output / slug(facts["device"]) / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
        report = Report(args.resume or file, facts, say=say)
    say(f"{report.facts}; budget {args.budget_s:.0f} s; {report.file}")
    chosen = [name for name in SECTIONS if name in args.sections]
    for index, section in enumerate(chosen):
        report.run(section, partial(measure, section, args, report, budget, timer))
        show(report, section)
        if not is_usable(device):
            go_on(args, report, chosen[index + 1 :], budget)
    say("== targets (one H200, bfloat16)")
    for target in TARGETS:
        say(target.line(report))
    say(f"wrote {report.file}")
    return 0


def is_usable(device: Any) -> bool:
    """After an illegal access every later call of a process fails."""
    import torch

    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def go_on(args: argparse.Namespace, report: Report, sections: list[str], budget: Budget) -> None:
    """Become a process that does the remaining sections."""
    report.say("   the device is unusable in this process")
    rest = ["--resume", str(report.file), "--budget-s", str(max(0.0, budget.left_s)), "--device", args.device]
    tiny = ["--tiny"] if args.tiny else []
    if sections:
        command = [sys.executable, "-m", "benchmarks.gpu", *rest, *tiny, "--dtype", args.dtype, "--sections", *sections]
        os.execv(sys.executable, command)


def measure(section: str, args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    """A section. Imports happen inside it: one that fails is the section's failure."""
    import torch

    dtype = getattr(torch, args.dtype)
    if section == "ceilings":
        from benchmarks.common.timing import copy_bandwidth, gemm_rate

        report.put("ceilings", "copy_bytes_s", copy_bandwidth(timer, 1 << 20 if args.tiny else 4 << 30))
        report.put("ceilings", "gemm_flop_s", gemm_rate(timer, 64 if args.tiny else 8192, dtype))
    elif section in GPU_SHAPES:
        from benchmarks.gpu.models import ModelBench

        ModelBench(report, budget, timer, section, TINY_SHAPE if args.tiny else SHAPES[section], tiny=args.tiny).run()
    elif section == "yardsticks":
        from benchmarks.gpu.yardsticks import measure_yardsticks

        measure_yardsticks(args.tiny, dtype, report, budget, timer)
    elif section in KERNEL_SECTIONS:
        from benchmarks.gpu.kernels import measure_section

        measure_section(section, args.tiny, dtype, report, budget, timer)
    elif args.tiny:
        report.put(section, "missing", "not in a tiny run")
    else:
        from benchmarks.gpu.peers import measure_peer

        measure_peer(report, budget)


def show(report: Report, section: str) -> None:
    """A section's table; whole models have said their figures already."""
    figures = report.sections.get(section, {})
    if section == "ceilings":
        report.say(f"   {figures}")
    if section in TABLES:
        rows = [{"what": name, **value} for name, value in figures.items() if isinstance(value, dict)]
        for line in keyed([{key: cell for key, cell in row.items() if key != "traceback"} for row in rows]):
            report.say(line)


if __name__ == "__main__":
    sys.exit(main())
