"""Continuous batching against one request at a time and static batches, on this machine's CPU.

    python -m benchmarks.batching                       # about 20 minutes on two cores
    python -m benchmarks.batching --quick               # does it work? 4 minutes; its figures mean little
    python -m benchmarks.batching --parts grid mixed

Five systems with the same weights, prompts and lengths: transformers one by one, in static batches with left padding
and with its own continuous batching, flashserve's engine alone, and flashserve through Triton with a client on the same
cores. Parts: the grid of requests, batch and output length; requests of mixed lengths at once, with what is wasted of
steps and of KV memory; and mixed lengths arriving over time, with throughput against latency. Writes Markdown, JSON and
pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.batching.grid import Grid, measure_grid
from benchmarks.batching.load import Mixed, measure_load, measure_mixed
from benchmarks.batching.pictures import draw_all
from benchmarks.batching.report import Findings, as_json, as_markdown
from benchmarks.batching.workload import mixed_lengths
from benchmarks.common.arguments import CACHE, CORES, new_parser, numbers
from benchmarks.common.environments import NotAvailable
from benchmarks.common.machine import describe_machine, measure_ceilings
from benchmarks.common.processes import Processes
from benchmarks.common.protocol import Requests
from benchmarks.common.random_model import make_random_model
from benchmarks.common.results import cpu_result, result_folder, write_json
from benchmarks.common.shapes import CPU_SHAPES, SHAPES, ModelCost
from benchmarks.common.worker import WorkerError

PARTS = ("grid", "mixed", "load")
QUICK = {"requests": [4, 8], "batch": [1, 4], "output": [4, 8], "prompt": 32, "rounds": 1, "load_batch": 4}
LONGEST = (256, 128)  # prompt and output of requests of mixed lengths
CONTEXT = 2048  # what a server would set aside for each request that it cannot see the end of


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, "batching")
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    add("--shape", choices=CPU_SHAPES, default="smollm2-135m", help="the model's shape (default: %(default)s)")
    add("--requests", type=numbers, default=[8, 32, 64, 128], help="of the grid (default: 8,32,64,128)")
    add("--batch", type=numbers, default=[1, 4, 8, 16, 32], help="of the grid (default: 1,4,8,16,32)")
    add("--output", type=numbers, default=[16, 32, 64], help="output tokens of the grid (default: 16,32,64)")
    add("--prompt", type=int, default=128, help="prompt tokens of the grid (default: %(default)s)")
    add("--rounds", type=int, default=2, help="of the grid (default: %(default)s)")
    add("--load-batch", type=int, default=16, help="batch under load (default: %(default)s)")
    add("--threads", type=int, default=CORES, help="of each system (default: all cores)")
    add("--quick", action="store_true", help="a corner of everything, in which options that are given still hold")
    add("--out", type=Path, help="where results go (default: benchmarks/batching/results; with --quick /tmp)")
    args = parser.parse_args()
    if args.quick:  # what is given all the same wins
        parser.set_defaults(**QUICK)
        args = parser.parse_args()
    if args.out is None:
        args.out = Path(tempfile.gettempdir(), "flashserve-batching") if args.quick else result_folder("batching")
    return args


def main() -> None:
    args = parse_arguments()
    started = time.monotonic()
    found = Findings(
        shape=args.shape,
        machine=describe_machine(),
        settings={name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        grid=Grid(args.requests, args.batch, args.output, args.prompt),
    )
    ceilings = measure_ceilings(ModelCost.of(SHAPES[args.shape]).weight_bytes, args.threads)
    found.ceilings = asdict(ceilings)
    print(ceilings)
    path = cpu_result(args.out.expanduser().resolve(), found.machine, f"{args.shape}{'-quick' if args.quick else ''}")
    try:
        _measure(args, found)
    except (WorkerError, NotAvailable) as error:
        sys.exit(f"a system failed: {error}\nwhat it said is in {CACHE / 'logs'}")
    text = as_markdown(found)
    print("\n" + text)
    write_json(path, as_json(found))
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    pictures = draw_all(path.with_suffix(""), found.subtitle, found.grid, found.mixed, found.points)
    print(f"{(time.monotonic() - started) / 60:.0f} minutes in all")
    for file in (path, path.with_suffix(".md"), *pictures):
        print(f"wrote {file}")


def _measure(args: argparse.Namespace, found: Findings) -> None:
    """All parts that are wanted, into ``found``."""
    model = make_random_model(args.shape)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    work = [
        (batch, Requests.equal(batch, args.prompt, max(args.output), vocab_size))
        for batch in sorted({*args.batch, args.load_batch})
    ]
    count, batch, scale = (8, 4, 0.25) if args.quick else (32, 8, 1.0)
    work.append((batch, Requests.equal(1, *LONGEST, vocab_size)))
    with Processes(model, CACHE, work, threads=args.threads) as processes:
        if "grid" in args.parts:
            print(f"grid: {len(found.grid.measurements())} measurements, {args.rounds} rounds", flush=True)
            measure_grid(processes, found.grid, args.rounds)
        if "mixed" in args.parts:
            found.mixed = Mixed(mixed_lengths(count, None, vocab_size, scale), batch, CONTEXT)
            measure_mixed(processes, found.mixed)
        if "load" in args.parts:
            measure_load(processes, args.load_batch, args.quick, found.points)
        found.versions = {name: text for each in processes.started.values() for name, text in each.versions.items()}


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all systems were ended")
