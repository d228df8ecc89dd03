"""Attention over a paged cache against the definition, row by row in float64."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from flashserve_kernels.attention import AttentionBatch, paged_attention
from flashserve_kernels.kv_cache import KVLayer

# (tokens computed in this step, tokens of the sequence so far)
DECODES = [(1, n) for n in (1, 2, 15, 16, 17, 40, 41, 200)]
PREFILLS = [(5, 5), (33, 33), (16, 48), (7, 100), (2, 2)]
BATCHES = {
    "one token": [(1, 1)],
    "decodes": DECODES,
    "decodes of one length": [(1, 37)] * 5,
    "decodes of very different lengths": [(1, 3)] * 40 + [(1, 900)] * 2,
    "prefills": PREFILLS,
    "mixed": DECODES + PREFILLS,
    "mixed in any order": [row for pair in zip(DECODES, PREFILLS, strict=False) for row in pair] + DECODES,
}
WINDOWS = [None, 1, 5, 16, 37, 4096]


class Problem:
    """Random queries, a cache whose unused slots hold garbage, and shuffled block tables."""

    def __init__(
        self,
        rows: list[tuple[int, int]],
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        interleaved: bool = False,
    ) -> None:
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        self.rows, self.heads, self.kv_heads, self.dim, self.block_size = rows, heads, kv_heads, dim, block_size
        needed = [-(-seq_len // block_size) for _, seq_len in rows]
        num_blocks = sum(needed) + 3
        ids = rng.sample(range(num_blocks), num_blocks)
        width = max(needed) + 2
        tables = [[ids.pop() for _ in range(n)] for n in needed]
        self.tables = torch.tensor([table + [ids[0]] * (width - len(table)) for table in tables], dtype=torch.int32)
        shape = (num_blocks, block_size, kv_heads, dim)
        cache = torch.randn(2, *shape, generator=generator).to(dtype)
        if interleaved:
            cache = cache.transpose(0, 1).contiguous().transpose(0, 1)
        self.cache = KVLayer(cache[0], cache[1])
        query_lens = [query_len for query_len, _ in rows]
        self.num_tokens = sum(query_lens)
        # Queries are a slice of the fused projection: strided.
        qkv = torch.randn(self.num_tokens, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
        self.q = qkv[:, :heads]
        self.starts = [0, *itertools.accumulate(query_lens)]
        self.batch = AttentionBatch(
            query_start_loc=torch.tensor(self.starts, dtype=torch.int32),
            seq_lens=torch.tensor([seq_len for _, seq_len in rows], dtype=torch.int32),
            block_tables=self.tables,
            slot_mapping=torch.zeros(self.num_tokens, dtype=torch.int64),
            block_size=block_size,
            max_query_len=max(query_lens),
            host_query_lens=query_lens,
            host_seq_lens=[seq_len for _, seq_len in rows],
        )

    def expected(self, scale: float, window: int | None) -> torch.Tensor:
        """softmax(q k^T scale) v over the keys a query sees, straight from the definition."""
        out = torch.empty(self.num_tokens, self.heads, self.dim, dtype=torch.float64)
        for row, (query_len, seq_len) in enumerate(self.rows):
            slots = [
                (int(self.tables[row, position // self.block_size]), position % self.block_size)
                for position in range(seq_len)
            ]
            k, v = (torch.stack([stored[slot] for slot in slots]).double() for stored in self.cache[:2])
            for index in range(query_len):
                position = seq_len - query_len + index
                first = 0 if window is None else max(0, position - window + 1)
                token = self.starts[row] + index
                for head in range(self.heads):
                    kv_head = head // (self.heads // self.kv_heads)
                    scores = k[first : position + 1, kv_head] @ self.q[token, head].double() * scale
                    out[token, head] = scores.softmax(0) @ v[first : position + 1, kv_head]
        return out.flatten(1)

    def check(self, scale: float = 0.3, window: int | None = None, tolerance: float = 1e-5) -> None:
        out = paged_attention(self.q, self.cache, self.batch, scale, window)
        assert out.dtype == self.q.dtype and out.shape == (self.num_tokens, self.heads * self.dim)
        torch.testing.assert_close(out.double(), self.expected(scale, window), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", BATCHES)
def test_ragged_batches(name):
    Problem(BATCHES[name]).check()


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_windows(window):
    Problem(DECODES + PREFILLS).check(window=window)


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 1), (9, 3)])
@pytest.mark.parametrize("dim", [8, 24, 64, 80])
def test_head_counts_and_sizes(heads, kv_heads, dim):
    Problem([(1, 30), (1, 5), (9, 20)], heads, kv_heads, dim).check(scale=dim**-0.5, window=11)


@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_block_sizes(block_size):
    for window in (None, 9):
        Problem(DECODES[:7] + PREFILLS, block_size=block_size).check(window=window)


def test_strided_cache():
    """All layers of a block together, as on a GPU: blocks do not follow each other without a gap."""
    problem = Problem(DECODES + PREFILLS, interleaved=True)
    assert problem.cache.k.stride(0) == 2 * problem.cache.k[0].numel()
    problem.check()


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_half_precision(dtype, tolerance):
    Problem(DECODES + PREFILLS, dtype=dtype).check(tolerance=tolerance)


def test_layers_share_the_plan_but_not_the_cache():
    """The groups are made once per step; a second layer with another cache must not see the first one's."""
    first, second = Problem(DECODES), Problem(DECODES, dtype=torch.float32)
    second.cache = KVLayer(first.cache.k.flip(0), first.cache.v.flip(0))
    second.batch = first.batch
    first.check()
    groups = first.batch.groups(None)
    second.check()
    assert second.batch.groups(None) is groups


def test_decodes_of_similar_length_share_one_gather():
    lens = [100, 101, 110, 115, 128, 2000]
    problem = Problem([(1, n) for n in lens])
    assert [group.num_tokens for group in problem.batch.groups(None)] == [5, 1]
