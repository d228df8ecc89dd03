"""The KV cache in the layout that the native attention reads (cpu/src/rope_cache.h), and its writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.memory import map_huge
from flashserve_kernels.cpu.program import DTYPES, Pool, emit, rows_of
from flashserve_kernels.kv_cache import KVCacheSpec

_GROUP = 16  # tokens that lie side by side, rope_cache.h's GROUP


@dataclass(frozen=True)
class PackedKVLayer:
    """Keys and values of one layer. A block's bytes are contiguous, so blocks are copied as rows of ``memory``."""

    memory: Tensor
    """[num_blocks, bytes per block] uint8; what is inside is the kernels' business."""
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    """Of the elements in the cache: the model's, or int8."""


def packed_block_bytes(spec: KVCacheSpec) -> int:
    """Bytes of a block over all layers; it has room for a multiple of 16 tokens, and 8 bits for a float32 scale per
    token and head beside them. Raises ValueError for heads that are not a multiple of 16, or another cache dtype."""
    if spec.head_dim <= 0 or spec.head_dim % 16:
        raise ValueError(f"the native kernels need heads of a multiple of 16 numbers, not {spec.head_dim}")
    if spec.cache_dtype not in (spec.dtype, torch.int8):
        raise ValueError(f"the native kernels store keys and values in {spec.dtype} or int8, not {spec.cache_dtype}")
    tokens = -(-spec.block_size // _GROUP) * _GROUP
    scales = tokens * torch.float32.itemsize if spec.cache_dtype == torch.int8 else 0
    return spec.num_layers * spec.num_kv_heads * 2 * (tokens * spec.head_dim * spec.cache_dtype.itemsize + scales)


def allocate_packed_kv_cache(spec: KVCacheSpec, num_blocks: int) -> list[PackedKVLayer]:
    """One allocation for all layers, zeroed; its pages are mapped but untouched until they are written. Raises
    ValueError as :func:`packed_block_bytes` does."""
    num_bytes = packed_block_bytes(spec) * num_blocks
    # Blocks are read in any order: with pages of 4 KiB most reads would miss the TLB.
    layers = map_huge(num_bytes).view(spec.num_layers, num_blocks, -1)
    return [
        PackedKVLayer(layer, spec.num_kv_heads, spec.head_dim, spec.block_size, spec.cache_dtype)
        for layer in layers.unbind(0)
    ]


def copy_blocks(cache: Sequence[PackedKVLayer], pairs: Tensor) -> None:
    """Block ``pairs[i, 1]`` becomes a copy of block ``pairs[i, 0]`` in all layers. pairs: [N, 2] int64. At once, never
    recorded: memory that is moved as it is needs no kernel."""
    sources, targets = pairs.unbind(1)
    for layer in cache:
        layer.memory[targets] = layer.memory[sources]


def rope_and_cache(
    pool: Pool, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: PackedKVLayer, slot_mapping: Tensor
) -> Tensor:
    """Rotate queries and keys in place, store keys and values in their slots, return the queries.

    qkv: [T, num_heads + 2 num_kv_heads, D], in the order queries, keys, values; cos_sin: [T, D] float32, the D/2
    cosines first; slot_mapping: [T] int64, -1 is not stored. Returns the view [T, num_heads, D] of qkv.
    """
    end = num_heads + cache.num_kv_heads
    if qkv.dim() != 3 or qkv.shape[1] != end + cache.num_kv_heads:
        raise ValueError(f"qkv must be [T, {end + cache.num_kv_heads}, {cache.head_dim}], not {tuple(qkv.shape)}")
    if cos_sin.dtype != torch.float32 or cos_sin.shape[-1] != cache.head_dim or cos_sin.stride(-1) != 1:
        raise ValueError(f"cos_sin must be float32 [T, {cache.head_dim}], not {cos_sin.dtype} {tuple(cos_sin.shape)}")
    q, k, v = qkv[:, :num_heads], qkv[:, num_heads:end], qkv[:, end:]
    _emit(pool, q, k, v, cos_sin, cache, slot_mapping)
    return q


def write_kv(pool: Pool, k: Tensor, v: Tensor, cache: PackedKVLayer, slot_mapping: Tensor) -> None:
    """Store each token's key and value. k, v: [T, num_kv_heads, D], adjacent in D; slot_mapping: [T] int64, -1 is not
    stored."""
    _emit(pool, None, k, v, None, cache, slot_mapping)


def _emit(
    pool: Pool, q: Tensor | None, k: Tensor, v: Tensor, cos_sin: Tensor | None, cache: PackedKVLayer, slots: Tensor
) -> None:
    shape = (cache.num_kv_heads, cache.head_dim)
    if k.shape[1:] != shape or v.shape != k.shape or v.dtype != k.dtype or k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError(f"k and v must be [T, {shape[0]}, {shape[1]}], not {tuple(k.shape)} and {tuple(v.shape)}")
    if cache.dtype not in (k.dtype, torch.int8):
        raise ValueError(f"the cache holds {cache.dtype}, the keys are {k.dtype}")
    if slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(f"slot_mapping must be contiguous int64, not {slots.dtype}")
    heads, q_row, q_head = (0, 0, 0) if q is None else (q.shape[1], q.stride(0), q.stride(1))
    emit(pool, program.ROPE_CACHE, k.dtype, rows_of(slots), (q, k, v, cos_sin, slots, cache.memory),
         (heads, *shape, q_row, q_head, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
          0 if cos_sin is None else cos_sin.stride(0), cache.block_size, DTYPES[cache.dtype]))  # fmt: skip
