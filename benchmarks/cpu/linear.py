"""The native packed linear against torch's with weights prepacked by oneDNN, and against what the memory delivers.

    python benchmarks/cpu_linear.py                                # SmolLM2-135M's shapes, bf16
    python benchmarks/cpu_linear.py --model tinyllama-1.1b --rows 1 16 512 --dtype bfloat16

Each product runs over so many copies of its weight that they do not stay in a cache, ours as one recorded program,
torch's one call after the other; the two take turns, and the best of the rounds counts (the bandwidth of a virtual
machine changes from minute to minute). GB/s counts the weight's bytes once.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.library import find_compiler, supported_isas
from flashserve_kernels.cpu.linear import linear, linear_silu_and_mul, pack_linear
from flashserve_kernels.cpu.program import Pool, Program

SHAPES = {  # name: (K, N)
    "smollm2-135m": {
        "qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152),
    },
    "tinyllama-1.1b": {
        "qkv": (2048, 2560), "o": (2048, 2048), "gate_up": (2048, 11264), "down": (5632, 2048), "head": (2048, 32000),
    },
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1000)

READ_SOURCE = """
#include <cstdint>
#include <thread>
#include <vector>
extern "C" uint64_t sum(const uint64_t* data, int64_t n, int num_threads) {
    std::vector<uint64_t> sums(num_threads * 8);
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; t++)
        threads.emplace_back([=, &sums] {
            uint64_t s = 0;
            for (int64_t i = n * t / num_threads; i < n * (t + 1) / num_threads; i++) s += data[i];
            sums[t * 8] = s;
        });
    for (std::thread& thread : threads) thread.join();
    return sums[0];
}
"""


def read_bandwidth(num_threads: int) -> float:
    """GB/s of summing 512 MB, the best of five."""
    compiler = find_compiler()
    if compiler is None:
        raise SystemExit("measuring the read bandwidth needs a C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "read.cpp"), Path(folder, "read.so")
        source.write_text(READ_SOURCE)
        flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        read = ctypes.CDLL(str(library)).sum
    read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    data = torch.randint(2**60, (2**26,))
    return data.numel() * 8 / min(seconds_of(lambda: read(data.data_ptr(), data.numel(), num_threads), 5)) / 1e9


def seconds_of(call: Callable[[], object], repeats: int) -> list[float]:
    """Wall seconds of each of the calls."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def rested_seconds(run: Callable[[], None]) -> float:
    """Wall seconds of a call when the threads of the other library have gone to sleep and this one's have woken up.

    OpenMP's threads spin for some milliseconds after their last work, on the cores that our threads need.
    """
    time.sleep(0.02)
    return seconds_of(run, 2)[-1]


def native_runner(
    pool: Pool, weights: list[torch.Tensor], name: str, rows: int, dtype: torch.dtype, quantize: bool
) -> Callable[[], None]:
    """Runs all products as one program."""
    gated = name == "gate_up"
    recorded = Program(pool, (rows, 1, 1))
    x = torch.randn(rows, weights[0].shape[1]).to(dtype)
    recorded.add_input(x, program.TOKENS)
    packed = [pack_linear(pool, weight, gated=gated, quantize=quantize) for weight in weights]
    with recorded.recording():
        for weight in packed:
            if gated:
                linear_silu_and_mul(pool, x, weight)
            else:
                linear(pool, x, weight, out_dtype=torch.float32 if name == "head" else None)
    return lambda: recorded.run(rows, 1, 1)


def torch_runner(weights: list[torch.Tensor], name: str, rows: int) -> Callable[[], None]:
    """torch's bfloat16 linear with prepacked weights; SwiGLU is not part of it."""
    x = torch.randn(rows, weights[0].shape[1]).bfloat16()

    def run() -> None:
        for weight in weights:
            torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--layers", nargs="+", help="only these: qkv, o, gate_up, down, head")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32", "int8"))
    parser.add_argument("--isa", default=supported_isas()[0], choices=supported_isas())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--megabytes", type=int, default=300, help="of weights in the copies of a product")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    quantize = args.dtype == "int8"
    dtype = torch.bfloat16 if quantize else getattr(torch, args.dtype)
    torch.set_num_threads(args.threads)
    pool = Pool(args.isa, args.threads)
    ceiling = read_bandwidth(args.threads)
    print(f"{args.model}, {args.dtype}, {args.isa}, {args.threads} threads; memory reads at {ceiling:.1f} GB/s")
    print(
        f"{'layer':8} {'K':>5} {'N':>6} {'rows':>5} {'ms':>8} {'GB/s':>6} {'of read':>7} {'TFLOP/s':>8} {'/ torch':>8}"
    )
    for name, (k, n) in SHAPES[args.model].items():
        if args.layers and name not in args.layers:
            continue
        size = n * k * (1 if quantize else dtype.itemsize)
        copies = max(1, round(args.megabytes * 1e6 / size))
        plain = [torch.randn(n, k).to(dtype)] * copies
        prepacked = [torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), 16) for weight in plain]
        for rows in args.rows:
            # Many rows take long and hardly notice where the weight comes from.
            used = max(1, min(copies, 4000 // rows)) if rows > 128 else copies
            runners = (
                native_runner(pool, plain[:used], name, rows, dtype, quantize),
                torch_runner(prepacked[:used], name, rows),
            )
            rounds = [[rested_seconds(run) for run in runners] for _ in range(args.rounds)]
            ours, theirs = (min(column) / used for column in zip(*rounds, strict=True))
            gigabytes = size / ours / 1e9
            print(
                f"{name:8} {k:5} {n:6} {rows:5} {ours * 1e3:8.3f} {gigabytes:6.1f} {gigabytes / ceiling:6.0%} "
                f"{2 * rows * n * k / ours / 1e12:8.2f} {theirs / ours:8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
