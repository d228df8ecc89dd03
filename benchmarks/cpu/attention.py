"""Native attention on this CPU: milliseconds of all layers, bytes of KV read per second, and operations per second.

    python benchmarks/cpu_attention.py [--threads 2] [--isa amx] [--seconds 0.5] [--kv-dtype int8]

Decode: all rows have the same context; each layer has its own cache, so that keys and values come from memory, as in a
step. Beside it stands what a plain read of the same amount of memory achieves. Prefill: whole prompts without context.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable

import torch

from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.cpu.attention import paged_attention
from flashserve_kernels.cpu.kv_cache import PackedKVLayer, allocate_packed_kv_cache
from flashserve_kernels.cpu.library import supported_isas
from flashserve_kernels.cpu.program import SEQS, TOKENS, Pool, Program

SHAPES = {"SmolLM2-135M": (30, 9, 3, 64), "TinyLlama-1.1B": (22, 32, 4, 64)}
"""Layers, query heads, KV heads, size of a head."""
DECODES = [(1, 160), (16, 160), (64, 160), (1, 1024), (16, 1024), (64, 1024), (1, 8192)]
"""Rows and context."""
PREFILLS = [(16, 128), (1, 1000)]
"""Prompts and their tokens."""
BLOCK_SIZE = 16


def make_batch(rows: int, query_len: int, seq_len: int) -> AttentionBatch:
    """Rows of one length, with shuffled blocks."""
    width = -(-seq_len // BLOCK_SIZE)
    ids = list(range(rows * width))
    random.Random(0).shuffle(ids)
    return AttentionBatch(
        query_start_loc=torch.tensor([0, *itertools.accumulate([query_len] * rows)], dtype=torch.int32),
        seq_lens=torch.full((rows,), seq_len, dtype=torch.int32),
        block_tables=torch.tensor(ids, dtype=torch.int32).view(rows, width),
        slot_mapping=torch.zeros(rows * query_len, dtype=torch.int64),
        block_size=BLOCK_SIZE,
        max_query_len=query_len,
    )


def median_ms(call: Callable[[], None], seconds: float) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times)[len(times) // 2]


def measure(pool: Pool, caches: list[PackedKVLayer], batch: AttentionBatch, heads: int, seconds: float) -> float:
    """Milliseconds of all layers, recorded and replayed as a step's operations are."""
    tokens, rows = int(batch.query_start_loc[-1]), len(batch.seq_lens)
    q = torch.randn(tokens, heads, caches[0].head_dim, dtype=torch.bfloat16)
    program = Program(pool, (tokens, rows, 1))
    program.add_input(q, TOKENS)
    for tensor in (batch.query_start_loc, batch.seq_lens, batch.block_tables):
        program.add_input(tensor, SEQS)
    with program.recording():
        for cache in caches:
            paged_attention(pool, q, cache, batch, caches[0].head_dim ** -0.5)
    return median_ms(lambda: program.run(tokens, rows, 0), seconds)


def read_gb_per_s(threads: int, seconds: float) -> float:
    """What a plain sum over 256 MB reads."""
    torch.set_num_threads(threads)
    memory = torch.ones(64 << 20, dtype=torch.int32)
    ms = median_ms(lambda: torch.ops.aten.max(memory), seconds)
    torch.set_num_threads(1)
    return memory.nbytes / ms / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", default=supported_isas()[0], choices=supported_isas())
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--kv-dtype", default="bfloat16", choices=("bfloat16", "int8"))
    arguments = parser.parse_args()
    pool = Pool(arguments.isa, arguments.threads)
    kv_dtype = getattr(torch, arguments.kv_dtype)
    print(f"{arguments.isa}, {arguments.threads} threads, KV {arguments.kv_dtype}; all layers")
    print(f"plain read: {read_gb_per_s(arguments.threads, arguments.seconds):.0f} GB/s")
    for name, (layers, heads, kv_heads, dim) in SHAPES.items():
        rows_and_lengths = [(r, 1, n) for r, n in DECODES] + [(r, n, n) for r, n in PREFILLS]
        num_blocks = max(rows * -(-seq_len // BLOCK_SIZE) for rows, _, seq_len in rows_and_lengths)
        caches = allocate_packed_kv_cache(layers, num_blocks, BLOCK_SIZE, kv_heads, dim, torch.bfloat16, kv_dtype)
        for cache in caches:
            cache.memory.random_(48, 64)  # numbers of about 1e-5 to 1, in every dtype
        print(f"\n{name}: {layers} layers, {heads} heads, {kv_heads} KV heads of {dim}")
        for rows, query_len, seq_len in rows_and_lengths:
            ms = measure(pool, caches, make_batch(rows, query_len, seq_len), heads, arguments.seconds)
            if query_len == 1:
                read = layers * rows * seq_len * kv_heads * dim * 2 * kv_dtype.itemsize
                print(f"  decode  {rows:3} x {seq_len:5}: {ms:8.3f} ms  {read / ms / 1e6:6.1f} GB/s")
            else:
                operations = layers * rows * seq_len * seq_len / 2 * heads * dim * 4
                print(f"  prefill {rows:3} x {seq_len:5}: {ms:8.3f} ms  {operations / ms / 1e6:6.0f} GFLOP/s")


if __name__ == "__main__":
    main()
