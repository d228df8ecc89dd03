"""Attention over a paged cache against the definition, row by row in float64."""

from __future__ import annotations

import pytest
import torch

from attention_problem import AttentionProblem
from flashserve_kernels.attention import paged_attention
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


class Problem(AttentionProblem):
    """In a cache whose unused slots hold garbage."""

    def __init__(
        self, rows, heads=6, kv_heads=2, dim=16, block_size=16, dtype=torch.float32, interleaved=False
    ) -> None:
        super().__init__(rows, heads, kv_heads, dim, block_size, dtype)
        cache = torch.randn(2, self.num_blocks * block_size, kv_heads, dim).to(dtype)
        for row in range(len(rows)):
            cache[:, self.slots(row)] = torch.stack([self.keys[row], self.values[row]])
        cache = cache.unflatten(1, (self.num_blocks, block_size))
        if interleaved:
            cache = cache.transpose(0, 1).contiguous().transpose(0, 1)
        self.cache = KVLayer(cache[0], cache[1])

    def check(self, scale: float = 0.3, window: int | None = None, tolerance: float = 1e-5) -> None:
        out = paged_attention(self.q, self.cache, self.batch, scale, window)
        assert out.dtype == self.q.dtype and out.shape == (len(self.q), self.heads * self.dim)
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
    first, second = Problem(DECODES), Problem(DECODES)
    second.cache = KVLayer(first.cache.v, first.cache.k)
    second.keys, second.values = first.values, first.keys
    second.batch = first.batch
    first.check()
    groups = first.batch.groups(None)
    second.check()
    assert second.batch.groups(None) is groups


def test_decodes_of_similar_length_share_one_gather():
    lens = [100, 101, 110, 115, 128, 2000]
    problem = Problem([(1, n) for n in lens])
    assert [group.num_tokens for group in problem.batch.groups(None)] == [5, 1]
