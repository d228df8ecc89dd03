"""Where the time of a step goes on a CPU: milliseconds per kind of operation.

Runs the model's recorded program as the engine does: prompts of --context tokens, then decodes. Medians of whole steps;
the kinds' shares are the mean of a few more steps. FLASHSERVE_KERNELS=native:avx2 in the environment forces a path.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np

from benchmarks.common.arguments import model_folder, numbers
from benchmarks.common.engine import load_on_cpu
from benchmarks.common.timing import wall_seconds
from flashserve.config import QUANTIZATIONS
from flashserve.protocol import SamplingParams
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput
from flashserve_kernels.cpu.program import KINDS

STEPS = 12
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
        max_model_len=args.context + 64,
    )
    for batch in args.batches:
        _measure(runner, batch, args.context)


def _measure(runner: ModelRunner, batch: int, context: int) -> None:
    """Print a line for the prompts' steps and one for the decodes."""
    blocks = -(-(context + STEPS + 8) // 16)
    greedy = SamplingParams(temperature=0)
    admissions = [Admission(i, i, greedy, 0, context, ()) for i in range(batch)]
    rows = [
        ScheduledRow(i, i, 0, context, [3 + (7 * i + j) % 30000 for j in range(context)],
                     list(range(i * blocks, (i + 1) * blocks)), 1)
        for i in range(batch)
    ]  # fmt: skip
    together = max(1, BUDGET // context)
    groups = [slice(first, first + together) for first in range(0, batch, together)]
    seconds = [
        sum(_step(runner, SchedulerOutput(0, admissions[g], rows[g], context * len(rows[g]), [])) for g in groups)
        for _ in range(3)
    ]
    last = len(rows[groups[-1]])
    _report(f"{batch} x {context} prompt", seconds, _shares(runner, (last * context, last, last)), batch * context)
    seconds = []
    for number in range(STEPS):
        decodes = [ScheduledRow(i, i, context + number, 1, [], [], 1) for i in range(batch)]
        seconds.append(_step(runner, SchedulerOutput(0, [], decodes, batch, [])))
    _report(f"{batch} x 1 decode", seconds, _shares(runner, (batch, batch, batch)), batch)


def _step(runner: ModelRunner, plan: SchedulerOutput) -> float:
    """Seconds from the plan to the tokens."""
    return wall_seconds(lambda: runner.wait(runner.submit(plan)))


def _shares(runner: ModelRunner, sizes: tuple[int, int, int], repeats: int = 4) -> dict[str, float]:
    """Milliseconds per kind of operation of the last step's program."""
    program = runner._steps._forward  # type: ignore[attr-defined]
    seconds = np.zeros(len(program.kinds))
    for _ in range(repeats):
        program.run(*sizes, seconds)
    totals: dict[str, float] = {}
    for kind, own in zip(program.kinds, seconds / repeats * 1e3, strict=True):
        totals[KINDS[kind]] = totals.get(KINDS[kind], 0.0) + own
    return totals


def _report(name: str, seconds: list[float], totals: dict[str, float], tokens: int) -> None:
    median = statistics.median(seconds)
    parts = ", ".join(
        f"{kind} {ms:.2f}" for kind, ms in sorted(totals.items(), key=lambda item: -item[1]) if ms >= 0.01
    )
    print(f"{name:18} {median * 1e3:8.2f} ms  {tokens / median:7.0f} tokens/s   {parts}", flush=True)
