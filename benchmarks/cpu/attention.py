"""Native attention on this CPU: milliseconds of all layers, bytes of KV read per second, and operations per second.

Decode: all rows have the same context; each layer has its own cache, so that keys and values come from memory, as in a
step. Beside it stands what a plain read of as much memory achieves. Prefill: whole prompts without context.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.common.arguments import CORES
from benchmarks.common.machine import read_bandwidth
from benchmarks.common.paged import BLOCK_SIZE, make_batch
from benchmarks.common.shapes import CPU_SHAPES, SHAPES, causal_flops, head_size
from benchmarks.common.timing import Timer
from flashserve_kernels import KVCacheSpec
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.cpu.attention import paged_attention
from flashserve_kernels.cpu.kv_cache import PackedKVLayer, allocate_packed_kv_cache
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.program import Pool, Program
from flashserve_kernels.recording import SEQS, TOKENS

DECODES = [(1, 160), (16, 160), (64, 160), (1, 1024), (16, 1024), (64, 1024), (1, 8192)]
"""Rows and context."""
PREFILLS = [(16, 128), (1, 1000)]
"""Prompts and their tokens."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=CORES, help="default: all cores")
    parser.add_argument("--isa", default=supported_isas()[0], choices=supported_isas())
    parser.add_argument("--seconds", type=float, default=0.5, help="per case (default: %(default)s)")
    parser.add_argument("--kv-dtype", default="bfloat16", choices=("bfloat16", "int8"))


def run(args: argparse.Namespace) -> None:
    pool, cpu = Pool(args.isa, args.threads), torch.device("cpu")
    timer = Timer(cpu, args.seconds)
    kv_dtype = getattr(torch, args.kv_dtype)
    print(f"{args.isa}, {args.threads} threads, KV {args.kv_dtype}; all layers")
    print(f"plain read: {read_bandwidth(256 << 20, args.threads):.0f} GB/s")
    torch.set_num_threads(1)
    cases = [(rows, 1, length) for rows, length in DECODES] + [(rows, length, length) for rows, length in PREFILLS]
    num_blocks = max(rows * -(-seq_len // BLOCK_SIZE) for rows, _, seq_len in cases)
    for name in CPU_SHAPES:
        shape, dim = SHAPES[name], head_size(SHAPES[name])
        layers, heads, kv_heads = (
            shape[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        )
        caches = allocate_packed_kv_cache(
            KVCacheSpec(layers, BLOCK_SIZE, kv_heads, dim, torch.bfloat16, kv_dtype), num_blocks
        )
        for cache in caches:
            cache.memory.random_(48, 64)  # numbers of about 1e-5 to 1, in every dtype
        print(f"\n{name}: {layers} layers, {heads} heads, {kv_heads} KV heads of {dim}")
        for rows, queries, seq_len in cases:
            ms = 1e3 * _seconds(timer, pool, caches, make_batch(rows, queries, seq_len, cpu), heads)
            read = layers * rows * seq_len * kv_heads * dim * 2 * kv_dtype.itemsize
            flops = layers * rows * causal_flops(queries, seq_len, heads, dim)
            rate = f"{read / ms / 1e6:6.1f} GB/s" if queries == 1 else f"{flops / ms / 1e6:6.0f} GFLOP/s"
            print(f"  {'decode ' if queries == 1 else 'prefill'} {rows:3} x {seq_len:5}: {ms:8.3f} ms  {rate}")


def _seconds(timer: Timer, pool: Pool, caches: list[PackedKVLayer], batch: AttentionBatch, heads: int) -> float:
    """All layers, recorded and replayed as a step's operations are."""
    tokens, rows = int(batch.query_start_loc[-1]), len(batch.seq_lens)
    q = torch.randn(tokens, heads, caches[0].head_dim, dtype=torch.bfloat16)
    program = Program(pool, (tokens, rows, 1))
    program.add_input(q, TOKENS)
    for tensor in (batch.query_start_loc, batch.seq_lens, batch.block_tables):
        program.add_input(tensor, SEQS)
    with program.recording():
        for cache in caches:
            paged_attention(pool, q, cache, batch, caches[0].head_dim ** -0.5)
    return timer.seconds(lambda: program.run(tokens, rows, 0))
