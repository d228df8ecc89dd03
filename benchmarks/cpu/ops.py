"""What the ops of this CPU reach of its memory and its arithmetic, beside torch's own ops in turn.

Matrix products and attention run over so many copies that no cache holds them, as in a step; the best of the calls
counts (the bandwidth of a virtual machine changes from minute to minute). torch's products have weights prepacked by
oneDNN. FLASHSERVE_KERNELS=native:avx2 in the environment forces a path.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common.arguments import CORES, numbers
from benchmarks.common.machine import read_ceilings
from benchmarks.common.op_cases import Case, attention_case, linear_cases, row_cases, sample_cases
from benchmarks.common.ops import cpu_copies, measure
from benchmarks.common.shapes import CPU_SHAPES, SHAPES, head_size
from benchmarks.common.tables import keyed
from benchmarks.common.timing import Timer
from flashserve_kernels.select import select_ops

KINDS = ("linear", "attention", "rows", "sample")
DECODES = ((1, 160), (16, 160), (64, 160), (1, 1024), (16, 1024), (64, 1024), (1, 8192))  # rows, context
PREFILLS = ((16, 128), (1, 1000))  # prompts, tokens of each


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=CPU_SHAPES, default="smollm2-135m", help="default: %(default)s")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--only", default="", help="cases whose name begins so, such as gate_up")
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 64, 512], help="of products (default: 1,16,64,512)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--int8", action="store_true", help="products with int8 weights, attention over an int8 cache")
    parser.add_argument("--threads", type=int, default=CORES, help="default: all cores")
    parser.add_argument("--seconds", type=float, default=0.5, help="per case (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    ops = select_ops(torch.device("cpu"), args.threads, head_size(SHAPES[args.shape]))
    ceilings = read_ceilings(512 << 20)
    print(f"{args.shape}, {args.dtype}{', int8' if args.int8 else ''}, {ops.name}, {args.threads} threads; {ceilings}")
    timer, rows = Timer(ops.device, args.seconds), []
    for case in cases(args, dtype.itemsize):
        print(f"  {case.name}", flush=True)
        rows.append({"": case.name, **measure(case, ops, dtype, timer, ceilings.rates, cpu_copies(case))})
    print("", *keyed(rows), sep="\n")


def cases(args: argparse.Namespace, item: int) -> list[Case]:
    """item: bytes of a number of the model's dtype."""
    config, small = SHAPES[args.shape], 1 if args.int8 else item
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], head_size(config)
    found: list[Case] = []
    if "linear" in args.kinds:
        found += linear_cases(config, args.tokens, small, "int8" if args.int8 else None)
    if "attention" in args.kinds:
        sizes = [(f"decode {rows} x {context}", rows, 1, context) for rows, context in DECODES]
        sizes += [(f"prefill {rows} x {tokens}", rows, tokens, tokens) for rows, tokens in PREFILLS]
        stored = torch.int8 if args.int8 else None
        found += [attention_case(*size, heads, kv_heads, dim, cache_dtype=stored, item=small) for size in sizes]
    if "rows" in args.kinds:
        found += row_cases(config, max(args.tokens), item)
    if "sample" in args.kinds:
        found += sample_cases(config["vocab_size"], 64, item)
    return [case for case in found if case.name.startswith(args.only)]
