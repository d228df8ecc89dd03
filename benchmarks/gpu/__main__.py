"""Everything about one GPU in one command: ceilings, kernels, decode, prefill, throughput, idle time, a peer.

    python -m benchmarks.gpu                                  # 8 minutes at most; needs no network and no weights
    python -m benchmarks.gpu --sections ceilings attention --budget-s 120
    python -m benchmarks.gpu --device cpu --tiny              # does the benchmark itself work?

Weights are random and made on the device. The result is printed, and written after every figure to
benchmarks/gpu/results/<gpu>/<date>.json, so that a run that is cut short keeps what it has. A section that fails says
so there and ends nothing else; where it leaves the device unusable, a new process does the rest. Kernels are compared
with float64, with torch's own op, and with the ceilings, which are measured first.
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
from benchmarks.common.results import ROOT, result_folder
from benchmarks.common.shapes import GPU_SHAPES, SHAPES, TINY_SHAPE
from benchmarks.common.tables import keyed
from benchmarks.gpu.report import TARGETS, Budget, Report, result_file

# A lent machine may have torch and nothing of ours.
sys.path[:0] = [str(ROOT / "backend"), str(ROOT / "kernels")]

SECTIONS = ("ceilings", "attention", "kernels", *GPU_SHAPES, "transformers")
PEER_WORKLOAD = (256, 128, 128)
KERNEL_KEYS = (
    "correct", "error", "same_tokens", "us", "gb_s", "tflop_s", "of_ceiling", "torch_us", "sdpa_us",
)  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = new_parser(__doc__, "gpu")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--budget-s", type=float, default=460.0, help="seconds; what does not fit is left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="the kernels'")
    parser.add_argument("--tiny", action="store_true", help="numbers that a CPU and Triton's interpreter can bear")
    parser.add_argument("--output", type=Path, default=result_folder("gpu"), help="folder for the result")
    parser.add_argument("--resume", type=Path, help="go on with this result file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING)
    if args.device == "cpu":
        interpret_kernels()
    import torch

    from benchmarks.common.timing import Timer, device_facts

    if args.device != "cpu" and not torch.cuda.is_available():
        print("torch sees no GPU; --device cpu --tiny tries the benchmark itself", file=sys.stderr)
        return 1
    device = torch.device("cuda:0" if args.device == "cuda" else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timer, budget = Timer(device), Budget(args.budget_s)
    say = partial(print, flush=True)
    if args.resume:
        report = Report.resume(args.resume, say)
    else:
        facts = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "dtype": args.dtype, **device_facts(device)}
        report = Report(result_file(args.output, facts["device"], time.localtime()), facts, say=say)
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
    if device.type != "cuda":
        return True
    import torch

    try:
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
    elif args.tiny and section == "transformers":
        report.put(section, "missing", "not in a tiny run")
    elif section == "transformers":
        measure_peer(report, budget)
    else:
        with torch.inference_mode():
            measure_ops(section, args.tiny, dtype, report, budget, timer)


def measure_ops(section: str, tiny: bool, dtype: Any, report: Report, budget: Budget, timer: Any) -> None:
    from benchmarks.gpu import attention, kernels

    sizes = kernels.Sizes.tiny() if tiny else kernels.Sizes()
    if section == "kernels":
        kernels.measure_kernels(report, timer, sizes, dtype)
    else:
        attention.measure_attention(report, budget, timer, dtype, attention.TINY_CASES if tiny else attention.CASES)


def measure_peer(report: Report, budget: Budget) -> None:
    from benchmarks.gpu.peers import TIMEOUT_S, measure_transformers

    for shape in GPU_SHAPES:
        budget.require(20, f"transformers on {shape}")
        found = measure_transformers(shape, *PEER_WORKLOAD, min(TIMEOUT_S, budget.left_s))
        ours = report.get(shape, "throughput {} x {}/{}".format(*PEER_WORKLOAD))
        if isinstance(ours, dict) and "tokens_s" in ours:
            found["flashserve_tokens_s"] = ours["tokens_s"]
        report.put("transformers", shape, found)
        report.say(f"   {shape}: {found}")


def interpret_kernels() -> None:
    """On a CPU the kernels run in Triton's interpreter, and the models on torch's ops."""
    os.environ["FLASHSERVE_KERNELS"] = "torch"
    os.environ["TRITON_INTERPRET"] = "1"


def show(report: Report, section: str) -> None:
    """A section's table; whole models have said their figures already."""
    rows = []
    for name, value in report.sections.get(section, {}).items():
        if isinstance(value, float) and section == "ceilings" and name != "seconds":
            report.say(f"   {name} {value:.4g}")
        elif isinstance(value, dict) and section in ("kernels", "attention") and name != "failure":
            row = {key: value[key] for key in KERNEL_KEYS if key in value}
            rows.append({"what": name, **({"failure": value["error"]} if "traceback" in value else row)})
    for line in keyed(rows) if rows else ():
        report.say(line)


if __name__ == "__main__":
    sys.exit(main())
