"""Attention in C++ on every instruction set, against the definition in float64.

Blocks that no sequence has, and slots beyond a sequence's end, hold NaN.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from attention_problem import AttentionProblem
from flashserve_kernels import KVCacheSpec
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.cpu.attention import paged_attention
from flashserve_kernels.cpu.kv_cache import allocate_packed_kv_cache, write_kv
from flashserve_kernels.cpu.program import Program
from flashserve_kernels.recording import SEQS, TOKENS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest output. bfloat16: results and weights are rounded to 2^-9.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
INT8_TOLERANCE = 0.03

# (tokens computed in this step, tokens of the sequence so far)
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 40, 41, 255, 256, 257, 530)]
PROMPTS = [(5, 5), (33, 33), (16, 48), (7, 100), (2, 2), (3, 70), (130, 301), (4, 290)]
MIXED = [row for pair in itertools.zip_longest(DECODES, PROMPTS) for row in pair if row]


class Problem(AttentionProblem):
    """In the packed cache; NaN wherever nothing was written."""

    def __init__(self, pool, rows, heads=6, kv_heads=2, dim=32, block_size=16, dtype=torch.float32, kv_dtype=None):
        super().__init__(rows, heads, kv_heads, dim, block_size, dtype, table_margin=5)
        self.pool = pool
        spec = KVCacheSpec(1, block_size, kv_heads, dim, dtype, kv_dtype or dtype)
        self.cache = allocate_packed_kv_cache(spec, self.num_blocks)[0]
        if kv_dtype is None:
            self.cache.memory.view(dtype).fill_(math.nan)
        slots = torch.cat([self.slots(row) for row in range(len(rows))])
        write_kv(pool, torch.cat(self.keys), torch.cat(self.values), self.cache, slots)

    def attend(self, **options):
        return paged_attention(self.pool, self.q, self.cache, self.batch, self.dim**-0.5, **options)

    def check(self, tolerance, **options):
        result, expected = self.attend(**options), self.expected(self.dim**-0.5, **options)
        assert result.shape == expected.shape
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[(1, 1)], MIXED], ids=["one token", "mixed"])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (8, 1), (22, 2)])
def test_ragged_batches(pool, dtype, rows, heads, kv_heads):
    Problem(pool, rows, heads, kv_heads, dtype=dtype).check(TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 112, 128, 256])
def test_head_sizes(pool, dtype, dim):
    Problem(pool, MIXED, dim=dim, dtype=dtype).check(TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 128])
def test_block_sizes(pool, dtype, block_size):
    Problem(pool, MIXED, dtype=dtype, block_size=block_size).check(TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [2, 3, 4, 5, 6, 7, 9, 12, 71])
def test_heads_per_kv_head(pool, heads):
    rows = [(1, 300), (1, 33), (9, 40)]
    Problem(pool, rows, heads, 1, dtype=torch.bfloat16).check(TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window, block_size", [(1, 16), (5, 24), (16, 16), (37, 24), (37, 16), (260, 16), (4096, 24)])
def test_sliding_window(pool, dtype, window, block_size):
    Problem(pool, MIXED, dtype=dtype, block_size=block_size).check(TOLERANCE[dtype], window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(pool, dtype):
    Problem(pool, MIXED, dtype=dtype).check(TOLERANCE[dtype], softcap=0.7)


@pytest.mark.parametrize("dtype, block_size", [(torch.float32, 24), (torch.bfloat16, 16), (torch.float16, 16)])
@pytest.mark.parametrize("options", [{}, {"window": 37}, {"softcap": 2.0}], ids=["plain", "window", "soft cap"])
def test_int8_cache(pool, dtype, block_size, options):
    problem = Problem(pool, MIXED, dtype=dtype, block_size=block_size, dim=80, kv_dtype=torch.int8)
    problem.check(INT8_TOLERANCE, **options)


@pytest.mark.parametrize("rows", [DECODES, PROMPTS], ids=["decodes", "prompts"])
def test_error_is_at_most_twice_that_of_torch(pool, rows):
    problem = Problem(pool, rows, 9, 3, 64, dtype=torch.bfloat16)
    expected = problem.expected(problem.dim**-0.5)
    torchs = torch.cat([problem.sdpa(row, problem.dim**-0.5) for row in range(len(rows))]).flatten(1)

    def error(result):
        return (result.double() - expected).square().mean().sqrt()

    assert error(problem.attend()) < 2 * error(torchs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_long_contexts_are_shared_without_changing_a_bit(pool, dtype):
    """Alone, a context's segments go to all threads; among others, one thread takes them."""
    lone = Problem(pool, [(1, 3000)], dtype=dtype)
    lone.check(TOLERANCE[dtype])
    crowd = Problem(pool, [(1, 3000), *[(1, 20)] * 40], dtype=dtype)
    crowd.q[0] = lone.q[0]
    write_kv(pool, lone.keys[0], lone.values[0], crowd.cache, crowd.slots(0))
    assert torch.equal(crowd.attend()[0], lone.attend()[0])


def test_a_row_without_tokens_is_passed_over_and_an_empty_sequence_gives_zeros(pool):
    problem = Problem(pool, [(1, 40), (1, 17), (1, 5)])
    whole = problem.attend()
    starts = torch.tensor([0, 1, 1, 2], dtype=torch.int32)
    batch = problem.batch
    padded = AttentionBatch(
        starts, torch.tensor([40, 9, 0], dtype=torch.int32), batch.block_tables, batch.slot_mapping, 16, 1
    )
    result = paged_attention(pool, problem.q[:2], problem.cache, padded, problem.dim**-0.5)
    assert torch.equal(result[0], whole[0])
    assert not result[1].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_recorded_program_serves_smaller_steps(pool, dtype):
    problem = Problem(pool, MIXED, dtype=dtype)
    starts, lens = problem.batch.query_start_loc.clone(), problem.batch.seq_lens.clone()
    tables, q = problem.batch.block_tables.clone(), problem.q.clone()
    batch = AttentionBatch(starts, lens, tables, problem.batch.slot_mapping, 16, 1)
    program = Program(pool, (len(q), len(lens), 1))
    program.add_input(q, TOKENS)
    for tensor in (starts, lens, tables):
        program.add_input(tensor, SEQS)
    with program.recording():
        out = paged_attention(pool, q, problem.cache, batch, problem.dim**-0.5)
    whole = problem.attend()
    query_lens = [query_len for query_len, _ in MIXED]
    for chosen in (range(len(MIXED)), [0], [1, 4], range(5, len(MIXED)), [len(MIXED) - 1, 3]):
        chosen = list(chosen)
        tokens = torch.cat([torch.arange(query_lens[row]) + problem.batch.query_start_loc[row] for row in chosen])
        q[: len(tokens)] = problem.q[tokens]
        starts[: len(chosen) + 1] = torch.tensor([0, *itertools.accumulate(query_lens[row] for row in chosen)])
        lens[: len(chosen)] = problem.batch.seq_lens[chosen]
        tables[: len(chosen)] = problem.batch.block_tables[chosen]
        out.fill_(math.nan)
        program.run(len(tokens), len(chosen), 0)
        assert torch.equal(out[: len(tokens)], whole[tokens])
        assert out[len(tokens) :].isnan().all()


def test_wrong_arguments_are_refused(pool):
    problem = Problem(pool, [(1, 4)])
    with pytest.raises(ValueError, match="cache holds"):
        paged_attention(pool, problem.q.half(), problem.cache, problem.batch, 1.0)
    with pytest.raises(ValueError, match="q must be"):
        paged_attention(pool, problem.q[:, :3], problem.cache, problem.batch, 1.0)
