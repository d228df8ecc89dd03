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
from collections.abc import Callable
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

SECTIONS = ("ceilings", "attention", "kernels", *GPU_SHAPES, "transformers", "torch-compile")
PEER_WORKLOAD = (256, 128, 128)
KERNEL_KEYS = (
    "correct", "error", "torch_error", "same_tokens", "us", "gb_s", "tflop_s", "of_ceiling", "torch_us", "sdpa_us",
    "ours_us",
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
        report.run(section, section_function(section, args, report, budget, timer))
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


def section_function(
    section: str, args: argparse.Namespace, report: Report, budget: Budget, timer: Any
) -> Callable[[], None]:
    """What measures a section. Imports happen inside it: one that fails is the section's failure."""
    own = {"ceilings": measure_ceilings, "kernels": measure_kernels, "attention": measure_attention}
    others = {"transformers": measure_peer, "torch-compile": measure_compiled}
    function = {**own, **others}.get(section, partial(measure_model, section))
    return lambda: function(args, report, budget, timer)


def measure_ceilings(args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    import torch

    from benchmarks.common.timing import copy_bandwidth, gemm_rate

    report.put("ceilings", "copy_bytes_s", copy_bandwidth(timer, 1 << 20 if args.tiny else 4 << 30))
    report.put("ceilings", "gemm_flop_s", gemm_rate(timer, 64 if args.tiny else 8192, getattr(torch, args.dtype)))


def measure_kernels(args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    import torch

    from benchmarks.gpu import kernels

    sizes = kernels.Sizes.tiny() if args.tiny else kernels.Sizes()
    with torch.inference_mode():
        kernels.measure_kernels(report, timer, sizes, getattr(torch, args.dtype))


def measure_attention(args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    import torch

    from benchmarks.gpu import attention

    cases = attention.TINY_CASES if args.tiny else attention.CASES
    with torch.inference_mode():
        attention.measure_attention(report, budget, timer, getattr(torch, args.dtype), cases)


def measure_compiled(args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    import torch

    from benchmarks.gpu import attention, kernels

    if args.tiny:
        report.put("torch-compile", "missing", "not in a tiny run")
        return
    dtype, prompt = getattr(torch, args.dtype), attention.CASES[1]
    with torch.inference_mode():
        attention.measure_flex(report, budget, timer, dtype, prompt)
        kernels.measure_compiled(report, budget, timer, kernels.Sizes(), dtype)


def measure_model(shape: str, args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    from benchmarks.gpu.models import ModelBench

    config = TINY_SHAPE if args.tiny else SHAPES[shape]
    ModelBench(report, budget, timer, shape, config, tiny=args.tiny).run()


def measure_peer(args: argparse.Namespace, report: Report, budget: Budget, timer: Any) -> None:
    from benchmarks.gpu.peers import TIMEOUT_S, measure_transformers

    for shape in GPU_SHAPES:
        if args.tiny:
            report.put("transformers", shape, {"missing": "not in a tiny run"})
            continue
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
        elif isinstance(value, dict) and section in ("kernels", "attention", "torch-compile") and name != "failure":
            row = {key: value[key] for key in KERNEL_KEYS if key in value}
            rows.append({"what": name, **({"failure": value["error"]} if "traceback" in value else row)})
    for line in keyed(rows) if rows else ():
        report.say(line)


if __name__ == "__main__":
    sys.exit(main())
