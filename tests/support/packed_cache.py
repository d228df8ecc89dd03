"""The packed KV cache's layout, read and written element by element: what the C++ must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.cpu.kv_cache import PackedKVLayer

GROUP = 16


def views(cache: PackedKVLayer) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values [blocks, KV heads, groups * 16, D], copied out of the cache.

    Third, if it is int8, their scales [blocks, KV heads, 2, groups * 16].
    """
    blocks, heads, dim = cache.memory.shape[0], cache.num_kv_heads, cache.head_dim
    groups = -(-cache.block_size // GROUP)
    pair = 1 if cache.dtype == torch.float32 else 2
    pieces = cache.memory.view(blocks, heads, -1)
    num_bytes = groups * GROUP * dim * cache.dtype.itemsize
    keys = pieces[..., :num_bytes].contiguous().view(cache.dtype).view(blocks, heads, groups, dim // pair, GROUP, pair)
    values = pieces[..., num_bytes : 2 * num_bytes].contiguous().view(cache.dtype)
    values = values.view(blocks, heads, groups, GROUP // pair, dim, pair)
    scales = None
    if cache.dtype == torch.int8:
        scales = pieces[..., 2 * num_bytes :].contiguous().view(torch.float32).view(blocks, heads, 2, groups * GROUP)
    return (
        keys.permute(0, 1, 2, 4, 3, 5).reshape(blocks, heads, groups * GROUP, dim),
        values.permute(0, 1, 2, 3, 5, 4).reshape(blocks, heads, groups * GROUP, dim),
        scales,
    )


def read_slots(cache: PackedKVLayer, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of slots, [n, KV heads, D] float64."""
    keys, values, scales = views(cache)
    block, offset = slots // cache.block_size, slots % cache.block_size
    k, v = keys[block, :, offset].double(), values[block, :, offset].double()
    if scales is not None:
        k, v = k * scales[block, :, 0, offset, None], v * scales[block, :, 1, offset, None]
    return k, v
