"""Rows of queries over a paged cache in shuffled blocks, and what attention is by its definition."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashserve_kernels.attention import AttentionBatch


class AttentionProblem:
    """Random queries, keys and values; a subclass puts the latter two where its kernel looks for them."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],
        heads: int,
        kv_heads: int,
        dim: int,
        block_size: int,
        dtype: torch.dtype,
        *,
        kv_dtype: torch.dtype | None = None,
        unused_blocks: int = 2,
        table_margin: int = 0,
        padding_tokens: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """rows: (tokens computed in this step, tokens of the sequence so far). kv_dtype: to which keys and values are
        rounded. unused_blocks: further columns of the block tables. table_margin: further columns of the table of which
        they are a part, as of the runner's. padding_tokens: tokens after the last row's."""
        rng, generator = random.Random(0), torch.Generator().manual_seed(0)
        self.rows, self.heads, self.kv_heads, self.dim, self.block_size = rows, heads, kv_heads, dim, block_size
        query_lens, seq_lens = ([row[i] for row in rows] for i in (0, 1))
        needed = [-(-seq_len // block_size) for seq_len in seq_lens]
        self.num_blocks = sum(needed) + 3
        ids = rng.sample(range(self.num_blocks), self.num_blocks)
        self.blocks = [[ids.pop() for _ in range(n)] for n in needed]
        # What lies beyond a row's blocks is the id of a block that nobody uses.
        width = max(needed) + unused_blocks
        tables = torch.full((len(rows), width + table_margin), ids[0], dtype=torch.int32)
        for table, blocks in zip(tables, self.blocks, strict=True):
            table[: len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
        self.keys, self.values = (
            [torch.randn(n, kv_heads, dim, generator=generator).to(kv_dtype or dtype) for n in seq_lens] for _ in "kv"
        )
        self.starts = [0, *itertools.accumulate(query_lens)]
        num_tokens = self.starts[-1] + padding_tokens
        # Queries are a slice of the fused projection: strided.
        qkv = torch.randn(num_tokens, heads + 2 * kv_heads, dim, generator=generator).to(dtype)
        self.q = qkv.to(device)[:, :heads]
        self.batch = AttentionBatch(
            query_start_loc=torch.tensor(self.starts, dtype=torch.int32, device=device),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32, device=device),
            block_tables=tables.to(device)[:, :width],
            slot_mapping=torch.full((num_tokens,), -1, device=device),
            block_size=block_size,
            max_query_len=max(query_lens),
            host_query_lens=query_lens,
            host_seq_lens=seq_lens,
        )

    def slots(self, row: int) -> Tensor:
        """[tokens] int64: where in the cache a row's tokens lie."""
        blocks = torch.tensor(self.blocks[row], dtype=torch.int64)
        position = torch.arange(self.rows[row][1])
        return blocks[position // self.block_size] * self.block_size + position % self.block_size

    def inputs(self, row: int, dtype: torch.dtype, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v as [heads, tokens, D], and which keys a query sees: [queries, keys]."""
        query_len, seq_len = self.rows[row]
        q = self.q[self.starts[row] : self.starts[row + 1]].cpu().to(dtype).transpose(0, 1)
        k, v = (x[row].to(dtype).transpose(0, 1) for x in (self.keys, self.values))
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 0) for x in (k, v))
        query, key = torch.arange(seq_len - query_len, seq_len)[:, None], torch.arange(seq_len)
        return q, k, v, (key <= query) & (key > query - (window or seq_len))

    def definition(self, row: int, scale: float, window: int | None = None, softcap: float | None = None) -> Tensor:
        """softmax(cap(q k^T scale)) v over the keys that a query sees, in float64: [queries, heads, D]."""
        q, k, v, mask = self.inputs(row, torch.float64, window)
        scores = q @ k.transpose(1, 2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    def sdpa(self, row: int, scale: float, window: int | None = None) -> Tensor:
        """The same by torch's own attention in the queries' dtype; without a soft cap, which it lacks."""
        q, k, v, mask = self.inputs(row, self.q.dtype, window)
        return F.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale)[0].transpose(0, 1).double()

    def expected(self, scale: float, window: int | None = None, softcap: float | None = None) -> Tensor:
        """[tokens, heads * D] float64."""
        return torch.cat([self.definition(row, scale, window, softcap) for row in range(len(self.rows))]).flatten(1)
