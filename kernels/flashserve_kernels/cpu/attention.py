"""Paged attention over the packed KV cache."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.kv_cache import PackedKVLayer
from flashserve_kernels.cpu.program import DTYPES, SEQS, Pool, Rows, emit, empty, recording_program, rows_of

if TYPE_CHECKING:
    from flashserve_kernels.attention import AttentionBatch

_GROUP, _SEGMENT_GROUPS = 16, 16  # rope_cache.h's GROUP, attention_decode.h's SEGMENT_GROUPS
_SLOTS_PER_THREAD, _COUNTER_BYTES = 4, 64  # attention_decode.h's Workspace

_workspaces: WeakKeyDictionary[Pool, Tensor] = WeakKeyDictionary()
"""Operations of a pool run one after the other, so they share one; it is zero whenever none runs."""


def paged_attention(
    pool: Pool,
    q: Tensor,
    cache: PackedKVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q k^T * scale) v`` of every token over its own sequence's earlier tokens and itself.

    q: [T, num_heads, D], adjacent in D, of the model's dtype. Of the batch, query_start_loc, seq_lens (int32) and
    block_tables (int32, any row stride) are read; a row without tokens is passed over, a token of a sequence of length
    0 gives zeros. Returns [T, num_heads * D].
    """
    _check(q, cache, batch)
    num_heads, dim = q.shape[1:]
    rows = rows_of(q)
    seqs = rows_of(batch.seq_lens) if recording_program() else Rows(SEQS, batch.seq_lens.shape[0])
    out = empty(rows, (num_heads * dim,), q.dtype)
    tables = batch.block_tables
    workspace = _workspace(pool, cache, num_heads, tables.shape[1])
    emit(pool, program.ATTENTION, q.dtype, rows,
         (q, cache.memory, batch.query_start_loc, batch.seq_lens, tables, out, workspace),
         (num_heads, cache.num_kv_heads, dim, q.stride(0), q.stride(1), out.stride(0), cache.block_size,
          DTYPES[cache.dtype], tables.stride(0), tables.shape[1], window or 0, pool.num_threads),
         (scale, softcap or 0.0), seqs)  # fmt: skip
    return out


def _workspace(pool: Pool, cache: PackedKVLayer, num_heads: int, columns: int) -> Tensor:
    """Where segments of long contexts meet. Zeroed memory is not touched before its first use."""
    groups = columns * -(-cache.block_size // _GROUP)
    per_segment = num_heads // cache.num_kv_heads * (cache.head_dim + _GROUP) * torch.float32.itemsize
    slots = _SLOTS_PER_THREAD * pool.num_threads
    num_bytes = slots * (_COUNTER_BYTES + -(-groups // _SEGMENT_GROUPS) * per_segment)
    found = _workspaces.get(pool)
    if found is None or len(found) < num_bytes:
        # A recorded operation keeps the one that it was recorded with.
        found = _workspaces[pool] = torch.zeros(num_bytes, dtype=torch.uint8)
    return found


def _check(q: Tensor, cache: PackedKVLayer, batch: AttentionBatch) -> None:
    if q.dim() != 3 or q.shape[2] != cache.head_dim or q.shape[1] % cache.num_kv_heads or q.stride(2) != 1:
        raise ValueError(
            f"q must be [T, n * {cache.num_kv_heads}, {cache.head_dim}], not {tuple(q.shape)} {q.stride()}"
        )
    if cache.dtype not in (q.dtype, torch.int8):
        raise ValueError(f"the cache holds {cache.dtype}, the queries are {q.dtype}")
    if batch.block_size != cache.block_size:
        raise ValueError(f"blocks hold {cache.block_size} tokens, the batch says {batch.block_size}")
    if batch.block_tables.stride(1) != 1:
        raise ValueError("block_tables' columns must be adjacent")
    for tensor in (batch.query_start_loc, batch.seq_lens, batch.block_tables):
        if tensor.dtype != torch.int32:
            raise ValueError(f"query_start_loc, seq_lens and block_tables must be int32, not {tensor.dtype}")
