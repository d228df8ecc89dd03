"""The paged KV cache: its memory layout, and the write of new keys and values.

The layout is private to the kernels of a device. Others know block ids and a layer's two strided views of shape
[num_blocks, block_size, num_kv_heads, head_dim]; a token's *slot* is ``block id * block_size + offset``.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class KVScales(NamedTuple):
    """What a layer's stored keys and values are multiplied with, where they are float8_e4m3fn."""

    k: float = 1.0
    v: float = 1.0


@dataclass(frozen=True)
class KVCacheSpec:
    """What a paged KV cache is made for, whatever its layout."""

    num_layers: int
    block_size: int
    """Tokens."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Of the keys and values that are written."""
    cache_dtype: torch.dtype
    """What is stored: the same, or 8 bits (int8 on a CPU, float8_e4m3fn on a GPU)."""
    scales: tuple[KVScales, ...] = ()
    """Of a float8_e4m3fn cache, per layer; none: all 1."""


class KVLayer(NamedTuple):
    """Keys and values of one layer: strided views [num_blocks, block_size, num_kv_heads, head_dim]."""

    k: Tensor
    v: Tensor
    k_scale: float = 1.0
    """What a stored key is multiplied with, where the cache is 8 bits wide."""
    v_scale: float = 1.0


def block_bytes(spec: KVCacheSpec) -> int:
    """Bytes of a block over all layers."""
    values = spec.num_layers * 2 * spec.block_size * spec.num_kv_heads * spec.head_dim
    return values * spec.cache_dtype.itemsize


def allocate_kv_cache(spec: KVCacheSpec, num_blocks: int, device: torch.device) -> list[KVLayer]:
    """One zeroed allocation, seen as a pair of views per layer.

    GPU: all layers of a block are contiguous, so that one copy moves a block. CPU: each layer's keys and values
    are contiguous, so that a gather of blocks is a run of memory copies; the memory is mapped but untouched, so
    blocks cost nothing before their first use. Zeroed, because attention multiplies what lies beyond a sequence's
    end by 0, and 0 * NaN is NaN.
    """
    block_shape = (spec.block_size, spec.num_kv_heads, spec.head_dim)
    if device.type == "cpu":
        shape = (spec.num_layers, 2, num_blocks, *block_shape)
        cache = _untouched_zeros(shape, spec.cache_dtype)
    else:
        cache = torch.zeros((num_blocks, spec.num_layers, 2, *block_shape), dtype=spec.cache_dtype, device=device)
        cache = cache.permute(1, 2, 0, 3, 4, 5)
    scales = spec.scales or (KVScales(),) * spec.num_layers
    return [KVLayer(layer[0], layer[1], *own) for layer, own in zip(cache.unbind(0), scales, strict=True)]


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros from an anonymous mapping; ``torch.zeros`` would write every page at once."""
    count = 1
    for size in shape:
        count *= size
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def copy_blocks(cache: Sequence[KVLayer], pairs: Tensor) -> None:
    """Block ``pairs[i, 1]`` becomes a copy of block ``pairs[i, 0]`` in all layers. pairs: [N, 2] int64."""
    sources, targets = pairs.unbind(1)
    for layer in cache:
        for blocks in (layer.k, layer.v):
            blocks[targets] = blocks[sources]


def write_kv(k: Tensor, v: Tensor, cache: KVLayer, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot.

    k, v: [T, num_kv_heads, head_dim], any strides; slot_mapping: [T] int64, all different but for -1: not stored.
    """
    stored = slot_mapping >= 0
    if not bool(stored.all()):
        k, v, slot_mapping = k[stored], v[stored], slot_mapping[stored]
    for new, into in ((k, cache.k), (v, cache.v)):
        block_size = into.shape[1]
        if into.stride(0) == block_size * into.stride(1):
            into.flatten(0, 1).index_copy_(0, slot_mapping, new)
        else:
            into[slot_mapping // block_size, slot_mapping % block_size] = new
