"""Where the time of a step goes on a CPU: milliseconds per kind of operation.

    python benchmarks/cpu_step.py M                          # M: a model folder (make_random_model.py makes one)
    python benchmarks/cpu_step.py M --quantization int8
    FLASHSERVE_KERNELS=native:avx2 python benchmarks/cpu_step.py M

Runs the model's recorded program as the engine does: prompts of --context tokens, then decodes. Medians of whole steps;
the kinds' shares are the mean of a few more steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np

from flashserve.config import EngineConfig, resolve
from flashserve.models.registry import read_model_facts
from flashserve.protocol import SamplingParams
from flashserve.runner.device import read_device_facts
from flashserve.runner.model_runner import ModelRunner
from flashserve.scheduling.output import Admission, ScheduledRow, SchedulerOutput
from flashserve_kernels.cpu.program import KINDS

STEPS = 12
BUDGET = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--batches", default="1,16,64", help="requests at once (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of each (default: %(default)s)")
    parser.add_argument("--quantization", choices=["int8"], help="of the linear layers")
    args = parser.parse_args()
    config = EngineConfig(
        str(args.model),
        dtype="bfloat16",
        quantization=args.quantization,
        kv_cache_memory_bytes=2 << 30,
        max_num_batched_tokens=BUDGET,
        max_model_len=args.context + 64,
    )
    resolved = resolve(config, read_model_facts(config, "cpu"), read_device_facts("cpu"))
    runner = ModelRunner(resolved)
    runner.load_weights()
    runner.prepare(resolved)
    for batch in map(int, args.batches.split(",")):
        measure(runner, batch, args.context)


def measure(runner: ModelRunner, batch: int, context: int) -> None:
    """Print a line for the prompts' steps and one for the decodes."""
    blocks = -(-(context + STEPS + 8) // 16)
    greedy = SamplingParams(temperature=0)
    admissions = [Admission(i, i, greedy, 0, context, ()) for i in range(batch)]
    rows = [
        ScheduledRow(i, i, 0, context, [3 + (7 * i + j) % 30000 for j in range(context)],
                     list(range(i * blocks, (i + 1) * blocks)), True)
        for i in range(batch)
    ]  # fmt: skip
    together = max(1, BUDGET // context)
    groups = [slice(first, first + together) for first in range(0, batch, together)]
    seconds = [
        sum(step(runner, SchedulerOutput(0, admissions[g], rows[g], context * len(rows[g]), [])) for g in groups)
        for _ in range(3)
    ]
    last = len(rows[groups[-1]])
    report(f"{batch} x {context} prompt", seconds, shares(runner, (last * context, last, last)), batch * context)
    seconds = []
    for number in range(STEPS):
        decodes = [ScheduledRow(i, i, context + number, 1, [], [], True) for i in range(batch)]
        seconds.append(step(runner, SchedulerOutput(0, [], decodes, batch, [])))
    report(f"{batch} x 1 decode", seconds, shares(runner, (batch, batch, batch)), batch)


def step(runner: ModelRunner, plan: SchedulerOutput) -> float:
    """Seconds from the plan to the tokens."""
    start = time.perf_counter()
    runner.wait(runner.submit(plan))
    return time.perf_counter() - start


def shares(runner: ModelRunner, sizes: tuple[int, int, int], repeats: int = 4) -> dict[str, float]:
    """Milliseconds per kind of operation of the last step's program."""
    program = runner._steps._forward  # type: ignore[union-attr]
    seconds = np.zeros(len(program.kinds))
    for _ in range(repeats):
        program.run(*sizes, seconds)
    totals: dict[str, float] = {}
    for kind, own in zip(program.kinds, seconds / repeats * 1e3, strict=True):
        totals[KINDS[kind]] = totals.get(KINDS[kind], 0.0) + own
    return totals


def report(name: str, seconds: list[float], totals: dict[str, float], tokens: int) -> None:
    median = statistics.median(seconds)
    parts = ", ".join(
        f"{kind} {ms:.2f}" for kind, ms in sorted(totals.items(), key=lambda item: -item[1]) if ms >= 0.01
    )
    print(f"{name:18} {median * 1e3:8.2f} ms  {tokens / median:7.0f} tokens/s   {parts}", flush=True)


if __name__ == "__main__":
    main()
