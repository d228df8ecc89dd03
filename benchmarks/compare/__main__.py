"""Compares flashserve with its peers on this machine's CPU: same weights, same prompts, in turn.

    python -m benchmarks.compare                                    # SmolLM2-135M's shape: 15-30 minutes
    python -m benchmarks.compare --served --ttft --int8             # everything
    python -m benchmarks.compare --shape tinyllama-1.1b --requests 1,4,16 --prompt 64,128
    python -m benchmarks.compare --engines flashserve,openvino --requests 16 --rounds 1

Random weights in bfloat16, greedy, prefix caching off, every answer exactly --output tokens long. Each engine is a
process with a thread for every core. In each round every engine runs once, the others stopped: the memory bandwidth
of a virtual machine changes from minute to minute, so only neighbours compare. Tokens per second are those of the
whole batch, from handing over all requests to the last token, prompts included.

Peers are installed into virtual environments of their own under --cache, with pip as it is configured here. A peer
that cannot be installed or fails is in the table with its reason. Result: a table, and a JSON and a plot under --out.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.common.arguments import CACHE, CORES, new_parser, numbers
from benchmarks.common.engines import DEFAULT, OFFLINE
from benchmarks.common.machine import describe_machine, measure_ceilings
from benchmarks.common.processes import Processes, fit_together
from benchmarks.common.random_model import make_random_model
from benchmarks.common.results import result_folder
from benchmarks.common.shapes import CPU_SHAPES, SHAPES, ModelCost
from benchmarks.compare.measure import OURS, Cell, Record, measure_round
from benchmarks.compare.report import Findings, table, write

TTFT_PROMPT = 1000


def names(text: str) -> list[str]:
    """Engines, in the table's order."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in OFFLINE]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown engine {unknown[0]!r}; there are {', '.join(OFFLINE)}")
    return [name for name in OFFLINE if name in chosen]


def parse_arguments() -> argparse.Namespace:
    parser = new_parser(__doc__, "compare")
    add = parser.add_argument
    add("--shape", default="smollm2-135m", choices=CPU_SHAPES, help="the model's shape (default: %(default)s)")
    add("--requests", type=numbers, default=[1, 16, 64], help="requests at once (default: 1,16,64)")
    add("--prompt", type=numbers, default=[128], help="prompt tokens; several lengths are possible (default: 128)")
    add("--output", type=int, default=64, help="output tokens of each request (default: %(default)s)")
    add("--rounds", type=int, default=3, help="interleaved rounds (default: %(default)s)")
    add("--engines", type=names, default=list(DEFAULT), help=f"of {', '.join(OFFLINE)}; default: all but int8")
    add("--int8", action="store_true", help="also flashserve with int8 weights")
    add("--ttft", action="store_true", help=f"also the time to the first token of one prompt of {TTFT_PROMPT} tokens")
    add("--served", action="store_true", help="also flashserve through Triton and vLLM's server, as users see them")
    add("--users", type=int, default=16, help="concurrent users of --served (default: %(default)s)")
    add("--loops", type=int, default=1, help="requests that each user sends, one after the other (default: 1)")
    add("--threads", type=int, default=CORES, help="threads of each engine (default: all cores)")
    add("--cache", type=Path, default=CACHE, help="where peers and models are kept")
    add("--out", type=Path, default=result_folder("compare"), help="where results go (default: %(default)s)")
    return parser.parse_args()


def cells_of(args: argparse.Namespace) -> list[Cell]:
    cells = [Cell(prompt, requests, args.output, requests) for prompt in args.prompt for requests in args.requests]
    if args.ttft:
        cells.append(Cell(TTFT_PROMPT, 1, 1, 1))
    if args.served:
        cells.append(Cell(args.prompt[-1], args.users * args.loops, args.output, args.users, served=True))
    return cells


def chosen_engines(args: argparse.Namespace) -> list[str]:
    chosen = [name for name in OFFLINE if name in args.engines or (args.int8 and name == "flashserve-int8")]
    return chosen + [f"{name}-served" for name in (OURS, "vllm") if args.served and name in chosen]


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started = time.monotonic()
    cache, vocab_size = args.cache.expanduser().resolve(), SHAPES[args.shape]["vocab_size"]
    found = Findings(
        shape=args.shape,
        machine=describe_machine(),
        # Not where things lie on this machine: that says nothing about the figures.
        settings={name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        cost=ModelCost.of(SHAPES[args.shape]),
        cells=cells_of(args),
        records={name: Record(name) for name in chosen_engines(args)},
    )
    model = make_random_model(args.shape, cache / "models" / args.shape)
    work = [(cell.batch, cell.work(vocab_size)) for cell in found.cells]
    keep = fit_together(found.cost, len(found.records))
    print(f"engines are {'loaded all the time' if keep else 'started for each turn'}", flush=True)
    with Processes(model, cache, work, threads=args.threads, keep=keep) as processes:
        for number in range(1, args.rounds + 1):
            processes.rest()
            found.ceilings.append(measure_ceilings(found.cost.weight_bytes, args.threads))
            print(f"round {number} of {args.rounds}: {found.ceilings[-1]}", flush=True)
            measure_round(processes, list(found.records.values()), found.cells, number)
    print(table(found))
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes in all")
    for path in write(found, args.out.expanduser().resolve()):
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all engines were ended")
