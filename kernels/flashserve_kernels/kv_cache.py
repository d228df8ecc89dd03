"""The paged KV cache: its memory layout, and the write of new keys and values.

The layout is private to the kernels of a device. Others know block ids and a layer's two strided views of shape
[num_blocks, block_size, num_kv_heads, head_dim]; a token's *slot* is ``block id * block_size + offset``.
"""

from __future__ import annotations

import mmap
from typing import NamedTuple

import torch
from torch import Tensor


class KVLayer(NamedTuple):
    """Keys and values of one layer: strided views [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    """What a stored key is multiplied with, where the cache is 8 bits wide."""
    v_scale: float = 1.0


def allocate_kv_cache(
    num_layers: int,
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[KVLayer]:
    """One zeroed allocation, seen as a pair of views per layer.

    GPU: all layers of a block are contiguous, so that one copy moves a block. CPU: each layer's keys and values
    are contiguous, so that a gather of blocks is a run of memory copies; the memory is mapped but untouched, so
    blocks cost nothing before their first use. Zeroed, because attention multiplies what lies beyond a sequence's
    end by 0, and 0 * NaN is NaN.
    """
    block_shape = (block_size, num_kv_heads, head_dim)
    if device.type == "cpu":
        shape = (num_layers, 2, num_blocks, *block_shape)
        cache = _untouched_zeros(shape, dtype)
    else:
        cache = torch.zeros((num_blocks, num_layers, 2, *block_shape), dtype=dtype, device=device)
        cache = cache.permute(1, 2, 0, 3, 4, 5)
    return [KVLayer(layer[0], layer[1]) for layer in cache.unbind(0)]


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros from an anonymous mapping; ``torch.zeros`` would write every page at once."""
    count = 1
    for size in shape:
        count *= size
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def write_kv(k: Tensor, v: Tensor, cache: KVLayer, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot.

    k, v: [T, num_kv_heads, head_dim], any strides; slot_mapping: [T] int64, all slots different.
    """
    for new, stored in ((k, cache.k), (v, cache.v)):
        block_size = stored.shape[1]
        if stored.stride(0) == block_size * stored.stride(1):
            stored.flatten(0, 1).index_copy_(0, slot_mapping, new)
        else:
            stored[slot_mapping // block_size, slot_mapping % block_size] = new
