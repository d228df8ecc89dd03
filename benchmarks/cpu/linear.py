"""The native packed linear against torch's with weights prepacked by oneDNN, and against what the memory delivers.

Each product runs over so many copies of its weight that they do not stay in a cache, ours as one recorded program,
torch's one call after the other; the two take turns, and the best of the rounds counts (the bandwidth of a virtual
machine changes from minute to minute). GB/s counts the weight's bytes once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.common.arguments import CORES, numbers
from benchmarks.common.machine import read_bandwidth
from benchmarks.common.shapes import CPU_SHAPES, SHAPES, linear_shapes
from benchmarks.common.timing import wall_seconds
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.linear import linear, linear_gated, pack_linear
from flashserve_kernels.cpu.program import Pool, Program
from flashserve_kernels.recording import TOKENS

LAYERS = tuple(linear_shapes(SHAPES["smollm2-135m"]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=CPU_SHAPES, default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=LAYERS, help="only these")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 64, 128, 512, 1000])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "int8"))
    parser.add_argument("--isa", default=supported_isas()[0], choices=supported_isas())
    parser.add_argument("--threads", type=int, default=CORES, help="default: all cores")
    parser.add_argument("--megabytes", type=int, default=300, help="of weights in the copies of a product")
    parser.add_argument("--rounds", type=int, default=3)


def run(args: argparse.Namespace) -> None:
    quantize = args.dtype == "int8"
    dtype = torch.bfloat16 if quantize else getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    pool = Pool(args.isa, args.threads)
    ceiling = read_bandwidth(512 << 20, args.threads)
    print(f"{args.shape}, {args.dtype}, {args.isa}, {args.threads} threads; memory reads at {ceiling:.1f} GB/s")
    print("layer        K      N  rows       ms   GB/s of read  TFLOP/s  / torch")
    for name in args.layers:
        k, n = linear_shapes(SHAPES[args.shape])[name]
        size = n * k * (1 if quantize else dtype.itemsize)
        copies = max(1, round(args.megabytes * 1e6 / size))
        plain = [torch.randn(n, k).to(dtype)] * copies
        prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), 16) for weight in plain]
        for rows in args.rows:
            # Many rows take long and hardly notice where the weight comes from.
            used = max(1, min(copies, 4000 // rows)) if rows > 128 else copies
            runners = (
                _native_runner(pool, plain[:used], name, rows, dtype, quantize),
                _torch_runner(prepacked[:used], rows),
            )
            rounds = [[_rested_seconds(run) for run in runners] for _ in range(args.rounds)]
            ours, theirs = (min(column) / used for column in zip(*rounds, strict=True))
            gigabytes = size / ours / 1e9
            print(
                f"{name:8} {k:5} {n:6} {rows:5} {ours * 1e3:8.3f} {gigabytes:6.1f} {gigabytes / ceiling:7.0%} "
                f"{2 * rows * n * k / ours / 1e12:8.2f} {theirs / ours:8.2f}",
                flush=True,
            )


def _rested_seconds(run: Callable[[], None]) -> float:
    """Of a call when the threads of the other library have gone to sleep and this one's have woken up.

    OpenMP's threads spin for some milliseconds after their last work, on the cores that our threads need.
    """
    time.sleep(0.02)
    run()
    return wall_seconds(run)


def _native_runner(
    pool: Pool, weights: list[torch.Tensor], name: str, rows: int, dtype: torch.dtype, quantize: bool
) -> Callable[[], None]:
    """Runs all products as one program."""
    gated = name == "gate_up"
    recorded = Program(pool, (rows, 1, 1))
    x = torch.randn(rows, weights[0].shape[1]).to(dtype)
    recorded.add_input(x, TOKENS)
    packed = [pack_linear(pool, weight, gated=gated, quantize=quantize) for weight in weights]
    with recorded.recording():
        for weight in packed:
            if gated:
                linear_gated(pool, x, weight, "silu")
            else:
                linear(pool, x, weight, out_dtype=torch.float32 if name == "head" else None)
    return lambda: recorded.run(rows, 1, 1)


def _torch_runner(weights: list[torch.Tensor], rows: int) -> Callable[[], None]:
    """torch's bfloat16 linear with prepacked weights; SwiGLU is not part of it."""
    x = torch.randn(rows, weights[0].shape[1]).bfloat16()

    def run() -> None:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return run
