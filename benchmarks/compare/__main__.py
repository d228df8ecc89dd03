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
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from benchmarks.common.arguments import CACHE, CORES, new_parser, numbers
from benchmarks.common.machine import Ceilings, describe_machine, measure_ceilings
from benchmarks.common.random_model import make_random_model
from benchmarks.common.results import result_folder
from benchmarks.common.shapes import CPU_SHAPES, ModelCost
from benchmarks.compare.engines import DEFAULT, ENGINES, OFFLINE
from benchmarks.compare.measure import Arena, Cell, Record, Setup
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
    add(
        "--keep",
        choices=("auto", "yes", "no"),
        default="auto",
        help="keep engines loaded between their turns, rather "
        "than start them for each; auto: if memory allows (default)",
    )
    add("--limit", type=float, default=600.0, help="seconds after which a run is given up (default: %(default)s)")
    add("--cache", type=Path, default=CACHE, help="where peers and models are kept")
    add("--out", type=Path, default=result_folder("compare"), help="where results go (default: %(default)s)")
    return parser.parse_args()


def offline_cells(args: argparse.Namespace) -> tuple[Cell, ...]:
    cells = [Cell(prompt, requests, args.output) for prompt in args.prompt for requests in args.requests]
    return (*cells, Cell(TTFT_PROMPT, 1, 1)) if args.ttft else tuple(cells)


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, _interrupt)
    started = time.monotonic()
    cache = args.cache.expanduser().resolve()
    (cache / "logs").mkdir(parents=True, exist_ok=True)
    model = make_random_model(args.shape, cache / "models" / args.shape)
    config = json.loads((model / "config.json").read_text())
    cost = ModelCost.of(config)
    keep = None if args.keep == "auto" else args.keep == "yes"
    setup = Setup(
        model=model,
        vocab_size=config["vocab_size"],
        weight_bytes=cost.weight_bytes,
        kv_bytes_per_token=cost.kv_bytes_per_token,
        cache=cache,
        threads=args.threads,
        cells=offline_cells(args),
        limit_s=args.limit,
        users=args.users,
        max_requests=max(args.requests),
    )
    chosen = [name for name in OFFLINE if name in args.engines or (args.int8 and name == "flashserve-int8")]
    ceilings: list[Ceilings] = []
    records = _measure(Arena(setup, [ENGINES[name] for name in chosen], keep), args.rounds, cost, ceilings)
    served, served_cell = {}, None
    if args.served:
        served_cell = Cell(args.prompt[-1], args.users * args.loops, args.output)
        wanted = ["flashserve", "flashserve-served"] if "flashserve" in chosen else []
        wanted += ["vllm-served"] if "vllm" in chosen else []
        arena = Arena(
            replace(setup, cells=(served_cell,), max_requests=args.users), [ENGINES[name] for name in wanted], keep
        )
        served = _measure(arena, args.rounds, cost, [])
    found = Findings(
        shape=args.shape,
        date=time.strftime("%Y-%m-%d-%H%M"),
        machine=describe_machine(),
        # Not where things lie on this machine: that says nothing about the figures.
        settings={name: value for name, value in vars(args).items() if not isinstance(value, Path)},
        cost=cost,
        ceilings=ceilings,
        cells=setup.cells,
        records=records,
        served=served,
        served_cell=served_cell,
    )
    print(table(found))
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes in all")
    for path in write(found, args.out.expanduser().resolve()):
        print(f"wrote {path}")


def _measure(arena: Arena, rounds: int, cost: ModelCost, ceilings: list[Ceilings]) -> dict[str, Record]:
    """All rounds of one arena; the machine's ceilings are added to ``ceilings``, one a round."""
    setup = arena.setup
    names = ", ".join(record.engine.title for record in arena.records.values())
    print(f"{names}: {'loaded all the time' if arena.keep else 'started for each turn'}", flush=True)
    try:
        arena.prepare()
        for number in arena.measure(rounds):
            measured = measure_ceilings(cost.weight_bytes, setup.threads, setup.cache)
            ceilings.append(measured)
            print(
                f"round {number} of {rounds}: {measured.read_gb_s:.1f} GB/s read, {measured.gemm_tflop_s:.2f} TFLOP/s",
                flush=True,
            )
    except BaseException:
        arena.close(at_once=True)
        raise
    arena.close()
    return arena.records


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all engines were ended")
