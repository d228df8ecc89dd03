"""Paged attention of mixed batches on a GPU: :func:`flashserve_kernels.paged_attention` with Triton-lang kernels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.gpu.attention_config import (
    MAX_DECODE_ROWS,
    MAX_SPLIT_QUERIES,
    AttentionConfig,
    AttentionShape,
    choose_config,
    invariant_config,
    max_split_tiles,
)
from flashserve_kernels.gpu.attention_kernel import attention_kernel
from flashserve_kernels.gpu.device import GPUProperties, gpu_properties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.kv_cache import KVLayer

_LOG2_E = math.log2(math.e)


def new_arrivals(device: torch.device) -> Tensor:
    """The counters by which the splits of a tile find out which of them ends last: all 0 between launches.

    One stream's launches share them. To be made before anything is captured: a graph's replays count on them, too.
    """
    return torch.zeros(max_split_tiles(gpu_properties(device)), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Part:
    """What one launch computes: of the rows ``first`` to ``end - 1`` those of so many tokens."""

    first: int
    end: int
    min_query_len: int
    max_query_len: int


def paged_attention(
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    *,
    arrivals: Tensor,
    batch_invariant: bool = False,
) -> Tensor:
    """``softmax(cap(q k^T * scale)) v`` of every token over its own sequence's earlier tokens and itself.

    q: [T, num_heads, D], D contiguous; cache: views [blocks, block size, num_kv_heads, D] of equal strides, D
    contiguous, the block size a power of two; E4M3 keys and values are multiplied by the layer's scales. Returns
    [T, num_heads * D]. Zeros for the tokens of a row of length 0; tokens that no row owns are left uninitialised.
    Reads no number of the batch on the host but its shapes, ``max_query_len`` and the bounds of its single tokens:
    beside longer rows these are a launch of their own, since a prompt's tile of 128 rows would hold the few heads of
    one token, and its keys could not be split. ``window``: a token sees so many tokens, itself included; ``softcap``:
    scores become ``cap * tanh(score / cap)``.

    arrivals: from :func:`new_arrivals`. The partial results of a decode that is split along its keys lie in two
    temporaries from torch's allocator: in a CUDA graph's pool they are allocated once, when it is captured.
    batch_invariant: one tile, one loop and no splits, so that a token's sums have one order in any batch.
    """
    num_tokens, num_heads, head_dim = q.shape
    _, block_size, num_kv_heads, _ = cache.k.shape
    _check(q, cache, window)
    out = q.new_empty((num_tokens, num_heads * head_dim))
    num_rows, table_width = batch.block_tables.shape
    if num_tokens == 0 or num_rows == 0:
        return out
    properties = gpu_properties(q.device)
    shape = AttentionShape(
        num_heads, num_kv_heads, head_dim, q.dtype, cache.k.dtype, block_size, window is not None, softcap is not None
    )
    for part in _parts(batch, apart=not batch_invariant):
        max_keys = table_width * block_size
        if window is not None:
            max_keys = min(max_keys, window + part.max_query_len)
        part_rows = part.end - part.first
        if batch_invariant:
            config = invariant_config(properties, shape)
        else:
            config = choose_config(properties, shape, part_rows, part.max_query_len, max_keys)
        splits = None
        if config.splits > 1:
            # At batch 64, 32 heads and 2 splits these are 2 MB per layer, next to 1 GB of keys and values of 4k tokens.
            # Single tokens are the first ones of the batch, whatever comes behind them.
            sizes = min(num_tokens, part_rows * part.max_query_len), num_heads, config.splits
            partial = torch.empty((*sizes, head_dim), dtype=torch.float32, device=q.device)
            splits = partial, torch.empty(sizes, dtype=torch.float32, device=q.device), arrivals
        _launch_attention(out, splits, q, cache, batch, part, properties, shape, config, scale, window, softcap)
    return out


def _parts(batch: AttentionBatch, apart: bool) -> list[_Part]:
    """apart: single tokens from prompts."""
    num_rows, longest = batch.block_tables.shape[0], max(1, batch.max_query_len)
    if not apart or not batch.max_singles or longest <= MAX_SPLIT_QUERIES:  # then all rows are computed as decodes
        return [_Part(0, num_rows, 0, longest)]
    prompts = _Part(batch.min_singles, num_rows, 2, longest)
    singles = _Part(0, min(batch.max_singles, num_rows), 0, 1)
    return [part for part in (singles, prompts) if part.first < part.end]


def _launch_attention(
    out: Tensor,
    splits: tuple[Tensor, Tensor, Tensor] | None,
    q: Tensor,
    cache: KVLayer,
    batch: AttentionBatch,
    part: _Part,
    properties: GPUProperties,
    shape: AttentionShape,
    config: AttentionConfig,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> None:
    k, v = cache.k, cache.v
    is_fp8 = k.dtype == torch.float8_e4m3fn
    as_bytes = is_fp8 and not properties.has_fp8
    if as_bytes:
        k, v = k.view(torch.uint8), v.view(torch.uint8)
    key_scale, value_scale = (cache.k_scale, cache.v_scale) if is_fp8 else (1.0, 1.0)
    scale *= key_scale
    first, num_rows = part.first, part.end - part.first
    head_tiles = shape.num_kv_heads * -(-shape.group // config.tile_heads)
    tiles_per_row = -(-part.max_query_len // config.block_q)
    if config.decode:
        grid = (head_tiles, num_rows * tiles_per_row, config.splits)
    else:
        grid = (q.shape[0] // config.block_q - first // config.block_q + num_rows, head_tiles, 1)
    launch(
        attention_kernel,
        grid,
        out,
        *(splits or (None, None, None)),
        q,
        k,
        v,
        batch.query_start_loc[first:],
        batch.seq_lens[first:],
        batch.block_tables[first:],
        num_rows,
        first // config.block_q,  # the rows before are single tokens
        tiles_per_row,
        part.min_query_len,
        part.max_query_len,
        scale * _LOG2_E if softcap is None else scale * _LOG2_E * 2 / softcap,
        0.0 if softcap is None else softcap * _LOG2_E,
        float(value_scale),
        0 if window is None else window,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        k.stride(2),
        batch.block_tables.stride(0),
        NUM_HEADS=shape.num_heads,
        GROUP=shape.group,
        TILE_HEADS=config.tile_heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_D=shape.block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_SIZE=shape.block_size,
        FIXED_TILES=config.decode,
        SPLITS=config.splits > 1,
        USE_WINDOW=shape.window,
        USE_SOFTCAP=shape.softcap,
        E4M3_BYTES=as_bytes,
        MASK_ALL=config.mask_all,
        EDGE_STAGES=config.edge_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _check(q: Tensor, cache: KVLayer, window: int | None) -> None:
    k, v = cache.k, cache.v
    if q.stride(2) != 1 or k.stride(3) != 1:
        raise ValueError("paged attention on a GPU needs queries, keys and values with a contiguous head dimension")
    if k.stride() != v.stride() or k.shape != v.shape:
        raise ValueError(f"keys and values need the same strides and shapes: {k.stride()}, {v.stride()}")
    if k.shape[1] & (k.shape[1] - 1):
        raise ValueError(f"block size {k.shape[1]}: a GPU needs a power of two")
    if q.shape[1] % k.shape[2]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[2]} KV heads")
    if window is not None and window < 1:
        raise ValueError(f"window {window}: a token sees at least itself")


def variants(
    properties: GPUProperties,
    shape: ModelShape,
    windows: Sequence[int | None] = (None,),
    softcap: float | None = None,
    batch_invariant: bool = False,
) -> Iterator[Variant]:
    """Whatever the launcher starts for a model with such windows (one per kind of layer), whatever the batch."""
    cache_shape = (2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    keys = torch.empty(cache_shape, dtype=shape.cache_dtype, device="meta")
    cache = KVLayer(keys, keys)

    def call(max_query_len: int, max_blocks: int, window: int | None) -> None:
        def integers(*sizes: int) -> Tensor:
            return torch.empty(sizes, dtype=torch.int32, device="meta")

        qkv_heads = shape.num_heads + 2 * shape.num_kv_heads
        qkv = torch.empty((max_query_len, qkv_heads, shape.head_dim), dtype=shape.dtype, device="meta")
        batch = AttentionBatch(
            query_start_loc=integers(2),
            seq_lens=integers(1),
            block_tables=integers(1, max_blocks),
            slot_mapping=integers(max_query_len),
            block_size=shape.block_size,
            max_query_len=max_query_len,
        )
        q, arrivals = qkv[:, : shape.num_heads], integers(16)
        paged_attention(q, cache, batch, 1.0, window, softcap, arrivals=arrivals, batch_invariant=batch_invariant)

    group = shape.num_heads // shape.num_kv_heads
    longest_decode = max(MAX_SPLIT_QUERIES, MAX_DECODE_ROWS // group)
    found: set[Variant] = set()
    # One row of many keys is split, one of a single block is not; the next length after decodes is a prefill.
    for window, max_query_len, max_blocks in itertools.product(windows, range(1, longest_decode + 2), (1 << 16, 1)):
        launched = record(properties, functools.partial(call, max_query_len, max_blocks, window))
        yield from (variant for variant in launched if variant not in found)
        found.update(launched)
