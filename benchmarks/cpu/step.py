"""Where the time of a step goes on a CPU: milliseconds per kind of operation.

Runs the model's recorded program as the engine does: as many prompts of --context tokens as fit into a step, then
decodes. Medians of whole steps; the kinds' shares are the mean of a few more steps. FLASHSERVE_KERNELS=native:avx2 in
the environment forces a path.
"""

from __future__ import annotations

import argparse
import itertools
import statistics

import numpy as np

from benchmarks.common.arguments import model_folder, numbers
from benchmarks.common.engine import load_on_cpu, repeatable_step
from benchmarks.common.timing import wall_seconds
from flashserve.config import QUANTIZATIONS
from flashserve.runner.model_runner import ModelRunner
from flashserve_kernels.cpu.program import KINDS

STEPS, PROFILED = 12, 4
BUDGET = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=model_folder, help="a model's folder, or smollm2-135m or tinyllama-1.1b")
    parser.add_argument("--batches", type=numbers, default=[1, 16, 64], help="requests at once (default: 1,16,64)")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each (default: %(default)s)")
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="of the linear layers")


def run(args: argparse.Namespace) -> None:
    runner = load_on_cpu(
        args.model,
        dtype="bfloat16",
        quantization=args.quantization,
        kv_cache_memory_bytes=2 << 30,
        max_num_batched_tokens=BUDGET,
        max_num_seqs=max(args.batches),
        max_model_len=args.context + 64,
    )
    context, together = args.context, max(1, BUDGET // args.context)
    steps = [[(min(batch, together), context, context), (batch, 1, context + 1)] for batch in args.batches]
    for step in dict.fromkeys(itertools.chain(*steps)):
        _measure(runner, *step)


def _measure(runner: ModelRunner, rows: int, queries: int, context: int) -> None:
    """Print a line for steps of ``queries`` tokens of each row."""
    plan = repeatable_step(runner, rows, queries, context, fill=True)
    median = statistics.median(wall_seconds(lambda: runner.wait(runner.submit(plan))) for _ in range(STEPS))
    kinds = _milliseconds(runner, (rows * queries, rows, rows))
    shown = ", ".join(f"{kind} {ms:.2f}" for kind, ms in sorted(kinds.items(), key=lambda item: -item[1]) if ms >= 0.01)
    name = f"{rows} x {queries} {'prompt' if queries > 1 else 'decode'}"
    print(f"{name:18} {median * 1e3:8.2f} ms  {rows * queries / median:7.0f} tokens/s   {shown}", flush=True)


def _milliseconds(runner: ModelRunner, sizes: tuple[int, int, int]) -> dict[str, float]:
    """Of the last step's program, by kind of operation."""
    program = runner._steps._forward  # type: ignore[attr-defined]
    seconds = np.zeros(len(program.kinds))
    for _ in range(PROFILED):
        program.run(*sizes, seconds)
    totals: dict[str, float] = {}
    for kind, own in zip(program.kinds, seconds / PROFILED * 1e3, strict=True):
        totals[KINDS[kind]] = totals.get(KINDS[kind], 0.0) + own
    return totals
