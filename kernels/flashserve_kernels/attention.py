"""Causal attention over a paged KV cache for ragged batches: prefill chunks and decodes mixed.

Grouped-query heads (Ainslie et al., 2023), optional sliding window (as in Mistral: a query sees itself and the
``window - 1`` tokens before it), and any context before a row's first query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flashserve_kernels.kv_cache import KVLayer

# Decode rows share one padded gather as long as the padding stays below this share of the blocks that are
# needed, or below this many blocks: a further group costs about 0.1 ms per layer on a CPU, a block 3-5 µs.
_MAX_PADDING = 0.25
_FREE_PADDING_BLOCKS = 24


@dataclass(frozen=True)
class AttentionBatch:
    """Where a step's tokens lie: R rows (one per sequence) of T tokens in all, packed without padding.

    The rows may come in any order; single-token rows that follow each other with similar lengths are the fastest.
    """

    query_start_loc: Tensor
    """[R + 1] int32: row r's tokens are ``query_start_loc[r] .. query_start_loc[r + 1] - 1``."""
    seq_lens: Tensor
    """[R] int32: tokens of the sequence up to and including the row's last one."""
    block_tables: Tensor
    """[R, B] int32: the row's blocks in order; entries beyond its length are valid ids of any block."""
    slot_mapping: Tensor
    """[T] int64: where each token's key and value are stored."""
    block_size: int
    max_query_len: int
    """No row has more tokens in this step; 1: decodes only."""
    min_singles: int = 0
    """The first rows of which each is known to have one token."""
    max_singles: int = 0
    """Rows of one token come first and are no more than these; 0: they may lie anywhere. Both numbers are the same but
    in captured steps, which serve batches that differ. With them a GPU computes decodes beside prompts as decodes."""
    host_query_lens: Sequence[int] = ()
    """The rows' lengths on the host, which the torch implementation plans with; captured steps have none."""
    host_seq_lens: Sequence[int] = ()
    _groups: dict[int | None, list[_Group]] = field(default_factory=dict, repr=False, compare=False)

    def groups(self, window: int | None) -> list[_Group]:
        """The rows cut into groups that one SDPA call serves; made once per step, all layers share them."""
        if window not in self._groups:
            self._groups[window] = _make_groups(self, window)
        return self._groups[window]


@dataclass(frozen=True)
class _Group:
    """Rows with one query each, or a single row with several."""

    first_token: int
    num_tokens: int
    blocks: Tensor
    """[n * blocks per row] int32, n = number of rows."""
    num_keys: int
    """Keys per row, from the start of its first block."""
    mask: Tensor | None
    """Bool, True where a query sees a key: [n, 1, 1, num_keys], or [queries, num_keys] for a chunk."""
    is_chunk: bool


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """``softmax(q k^T * scale) v`` of every token over its own sequence's earlier tokens and itself.

    q: [T, num_heads, D], any strides; the keys and values of this step are already in the cache. softcap: scores are
    ``softcap * tanh(score / softcap)`` before the softmax (Gemma 2). Returns [T, num_heads * D].
    """
    num_tokens, num_heads, head_dim = q.shape
    out = q.new_empty((num_tokens, num_heads * head_dim))
    num_kv_heads = cache.k.shape[2]
    # Grouped-query heads without repeating keys: [T, KV head, query heads of the group, D].
    q = q.unflatten(1, (num_kv_heads, -1))
    out_heads = out.view(q.shape)
    for group in batch.groups(window):
        tokens = slice(group.first_token, group.first_token + group.num_tokens)
        attend = _attend_chunk if group.is_chunk else _attend_decodes
        attend(q[tokens], cache, group, scale, softcap, out_heads[tokens])
    return out


def _attend_decodes(q: Tensor, cache: KVLayer, group: _Group, scale: float, softcap: float | None, out: Tensor) -> None:
    """n rows of one token: the heads that share a KV head take SDPA's query dimension. q, out: [n, KV, G, D]."""
    num_kv_heads, head_dim = q.shape[1], q.shape[3]
    shape = (group.num_tokens, -1, num_kv_heads, head_dim)
    k, v = (
        stored.index_select(0, group.blocks).view(shape)[:, : group.num_keys].transpose(1, 2)
        for stored in (cache.k, cache.v)
    )
    out.copy_(_attend(q, k, v, group.mask, False, scale, softcap))


def _attend_chunk(q: Tensor, cache: KVLayer, group: _Group, scale: float, softcap: float | None, out: Tensor) -> None:
    """One row of several tokens: KV heads are SDPA's batch, their query heads its heads. q, out: [n, KV, G, D]."""
    heads_per_kv = q.shape[2]
    k, v = (
        # Query heads of a group share their keys through a stride of 0.
        stored.index_select(0, group.blocks)
        .flatten(0, 1)[: group.num_keys]
        .permute(1, 0, 2)[:, None]
        .expand(-1, heads_per_kv, -1, -1)
        for stored in (cache.k, cache.v)
    )
    result = _attend(q.permute(1, 2, 0, 3), k, v, group.mask, group.mask is None, scale, softcap)
    out.copy_(result.permute(2, 0, 1, 3))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, softcap: float | None
) -> Tensor:
    """SDPA, which knows no soft cap: with one, the definition."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale)
    scores = (q @ k.transpose(-1, -2)).float().mul_(scale / softcap).tanh_().mul_(softcap)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril_()
    if mask is not None:
        scores.masked_fill_(~mask, float("-inf"))
    return scores.softmax(-1).to(v.dtype) @ v


def _make_groups(batch: AttentionBatch, window: int | None) -> list[_Group]:
    groups = []
    row, token, num_rows = 0, 0, len(batch.host_query_lens)
    while row < num_rows:
        query_len = batch.host_query_lens[row]
        if query_len == 1:
            end = _end_of_decode_group(batch, row, window)
            groups.append(_decode_group(batch, row, end, token, window))
            token += end - row
            row = end
        else:
            groups.append(_chunk_group(batch, row, token, window))
            token += query_len
            row += 1
    return groups


def _num_visible_blocks(seq_len: int, block_size: int, window: int | None) -> int:
    """Blocks that the last token of a sequence sees."""
    first = 0 if window is None else max(0, seq_len - window) // block_size
    return -(-seq_len // block_size) - first


def _end_of_decode_group(batch: AttentionBatch, start: int, window: int | None) -> int:
    """The first row after ``start`` that should not share its padded gather."""
    widest = needed = 0
    for row in range(start, len(batch.host_query_lens)):
        if batch.host_query_lens[row] != 1:
            return row
        blocks = _num_visible_blocks(batch.host_seq_lens[row], batch.block_size, window)
        widest, needed = max(widest, blocks), needed + blocks
        padding = widest * (row - start + 1) - needed
        if padding > max(_FREE_PADDING_BLOCKS, _MAX_PADDING * needed):
            return row
    return len(batch.host_query_lens)


def _decode_group(batch: AttentionBatch, start: int, end: int, token: int, window: int | None) -> _Group:
    lens = batch.host_seq_lens[start:end]
    width = max(_num_visible_blocks(n, batch.block_size, window) for n in lens)
    tables, seq_lens = batch.block_tables[start:end], batch.seq_lens[start:end].long()
    device = tables.device
    if window is None or max(lens) <= window:
        first_key = torch.zeros_like(seq_lens)
        blocks, num_keys = tables[:, :width], max(lens)
    else:
        first_block = (seq_lens - window).clamp_(min=0).div_(batch.block_size, rounding_mode="floor")
        columns = first_block[:, None] + torch.arange(width, device=device)
        blocks = tables.gather(1, columns.clamp_(max=tables.shape[1] - 1))
        first_key, num_keys = first_block * batch.block_size, width * batch.block_size
    mask = None
    if window is not None or min(lens) != num_keys:
        position = first_key[:, None] + torch.arange(num_keys, device=device)
        mask = position < seq_lens[:, None]
        if window is not None:
            mask &= position >= seq_lens[:, None] - window
        mask = mask[:, None, None]
    return _Group(token, end - start, blocks.flatten(), num_keys, mask, is_chunk=False)


def _chunk_group(batch: AttentionBatch, row: int, token: int, window: int | None) -> _Group:
    query_len, seq_len = batch.host_query_lens[row], batch.host_seq_lens[row]
    start = seq_len - query_len
    first_block = 0 if window is None else max(0, start - window + 1) // batch.block_size
    end_block = -(-seq_len // batch.block_size)
    first_key = first_block * batch.block_size
    num_keys = seq_len - first_key
    mask = None
    if start > 0 or (window is not None and window < seq_len):
        device = batch.block_tables.device
        query = torch.arange(start, seq_len, device=device)[:, None]
        key = torch.arange(first_key, seq_len, device=device)
        mask = key <= query
        if window is not None:
            mask &= key > query - window
    blocks = batch.block_tables[row, first_block:end_block]
    return _Group(token, query_len, blocks, num_keys, mask, is_chunk=True)
