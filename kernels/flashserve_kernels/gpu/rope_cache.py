"""Norms and rotary embedding of queries and keys with the write to the KV cache: see :mod:`flashserve_kernels.rotary`.

Bound by memory: per element of a 16-bit dtype, a query moves 4 bytes (read, written in place), a key 6 (and stored),
a value 4; the cosines and sines are read once per program of 16 heads. One launch instead of five with the norms,
since at a decode step's sizes (8B model: 12 KB per token) the launches are what costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.dependent import wait_for_inputs
from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record
from flashserve_kernels.kv_cache import KVLayer

_FP8 = torch.float8_e4m3fn
_HEADS = 16  # per program; a tile of 16 heads of 128 is 16 elements per thread


@triton.jit
def encode_e4m3(x):
    """float32 to the byte of e4m3 (Micikevicius et al., 2022), nearest even, saturating at 448.

    By integers, because GPUs before compute capability 8.9 have no conversion and the kernel waits for memory anyway;
    so the bytes are the same on every device.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    wide = magnitude.to(tl.int32, bitcast=True)
    # Round at bit 20, where e4m3's three mantissa bits end, and move the exponent's bias from 127 to 7.
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 the steps are 2^-9; the sum with 1.5 * 2^23 leaves the rounded count in the low bits.
    tiny = (magnitude * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    return (tl.where(magnitude < 0.015625, tiny, normal) | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def to_cache(x, scale, dtype: tl.constexpr, FP8: tl.constexpr):
    """float32 to what the cache stores."""
    if FP8:
        x = encode_e4m3(tl.div_rn(x, scale))
    return x.to(dtype)


@triton.jit
def _normed(x, sums, q_weight_ptr, k_weight_ptr, column, in_half, is_query, D: tl.constexpr, eps, dtype: tl.constexpr):
    """Half of each query and key over the root of its head's mean square, rounded as a norm of its own stores it."""
    q_weight = tl.load(q_weight_ptr + column, in_half, other=0.0).to(tl.float32)
    k_weight = tl.load(k_weight_ptr + column, in_half, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(sums / D + eps)
    return (x * scale[:, None] * tl.where(is_query, q_weight, k_weight)).to(dtype).to(tl.float32)


@triton.jit
def rope_and_cache_kernel(
    qkv_ptr,
    q_weight_ptr,  # None: no norms before the rotation
    k_weight_ptr,
    eps,
    cos_sin_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_scale,
    v_scale,
    token_stride,
    head_stride,
    cos_sin_stride,
    block_stride,
    slot_stride,
    cache_head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    wait_for_inputs(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    in_half = column < HALF
    mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & in_half
    is_rotated = head < NUM_HEADS + NUM_KV_HEADS
    at = qkv_ptr + token * token_stride + head * head_stride + column
    a = tl.load(at, mask, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask, other=0.0).to(tl.float32)
    if q_weight_ptr is not None:
        dtype: tl.constexpr = qkv_ptr.dtype.element_ty
        is_query = head < NUM_HEADS
        sums = tl.sum(a * a + b * b, 1)
        normed_a = _normed(a, sums, q_weight_ptr, k_weight_ptr, column, in_half, is_query, 2 * HALF, eps, dtype)
        normed_b = _normed(
            b, sums, q_weight_ptr + HALF, k_weight_ptr + HALF, column, in_half, is_query, 2 * HALF, eps, dtype
        )
        a = tl.where(is_rotated, normed_a, a)
        b = tl.where(is_rotated, normed_b, b)
    cos = tl.load(cos_sin_ptr + token * cos_sin_stride + column, in_half, other=0.0)
    sin = tl.load(cos_sin_ptr + token * cos_sin_stride + HALF + column, in_half, other=0.0)
    rotated_a = a * cos - b * sin
    rotated_b = b * cos + a * sin
    tl.store(at, rotated_a.to(qkv_ptr.dtype.element_ty), mask & is_rotated)
    tl.store(at + HALF, rotated_b.to(qkv_ptr.dtype.element_ty), mask & is_rotated)

    slot = tl.load(slots_ptr + token)
    stored = mask & (slot >= 0)
    in_cache = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride + column
    k_at = k_cache_ptr + in_cache + (head - NUM_HEADS) * cache_head_stride
    is_key = stored & (head >= NUM_HEADS) & is_rotated
    # A key is stored as it stands in qkv, rounded to its dtype first: an attention over either sees one key.
    key_a = rotated_a.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    key_b = rotated_b.to(qkv_ptr.dtype.element_ty).to(tl.float32)
    tl.store(k_at, to_cache(key_a, k_scale, k_cache_ptr.dtype.element_ty, FP8), is_key)
    tl.store(k_at + HALF, to_cache(key_b, k_scale, k_cache_ptr.dtype.element_ty, FP8), is_key)
    v_at = v_cache_ptr + in_cache + (head - NUM_HEADS - NUM_KV_HEADS) * cache_head_stride
    is_value = stored & (head >= NUM_HEADS + NUM_KV_HEADS)
    tl.store(v_at, to_cache(a, v_scale, v_cache_ptr.dtype.element_ty, FP8), is_value)
    tl.store(v_at + HALF, to_cache(b, v_scale, v_cache_ptr.dtype.element_ty, FP8), is_value)


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    k_scale,
    v_scale,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    block_stride,
    slot_stride,
    cache_head_stride,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    FP8: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (head < NUM_KV_HEADS) & (column < D) & (slot >= 0)
    k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + column, mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + column, mask, other=0.0).to(tl.float32)
    at = (slot // BLOCK_SIZE) * block_stride + (slot % BLOCK_SIZE) * slot_stride + head * cache_head_stride + column
    tl.store(k_cache_ptr + at, to_cache(k, k_scale, k_cache_ptr.dtype.element_ty, FP8), mask)
    tl.store(v_cache_ptr + at, to_cache(v, v_scale, v_cache_ptr.dtype.element_ty, FP8), mask)


def _cache_strides(cache: KVLayer) -> tuple[int, int, int]:
    """Strides of a block, a slot in it and a head; keys and values are laid out alike."""
    if cache.k.stride() != cache.v.stride() or cache.k.stride(3) != 1:
        raise ValueError(f"keys {cache.k.stride()} and values {cache.v.stride()} need equal strides, the last one 1")
    return cache.k.stride(0), cache.k.stride(1), cache.k.stride(2)


def rope_and_cache(qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: KVLayer, slot_mapping: Tensor) -> Tensor:
    """Rotate queries and keys in place, store keys and values in their slots, return the queries.

    qkv: [T, num_heads + 2 num_kv_heads, D], D contiguous; cos_sin: [T, D] float32; slot_mapping: [T] int64, a
    negative slot is not stored. An e4m3 cache holds ``k / k_scale`` and ``v / v_scale``. Returns the view
    [T, num_heads, D] of qkv.
    """
    return _rope_and_cache(qkv, num_heads, None, None, 0.0, cos_sin, cache, slot_mapping)


def norm_rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
) -> Tensor:
    """As :func:`rope_and_cache`, with an RMSNorm of each query and key first. q_weight, k_weight: [D]."""
    return _rope_and_cache(qkv, num_heads, q_weight, k_weight, eps, cos_sin, cache, slot_mapping)


def _rope_and_cache(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    cache: KVLayer,
    slot_mapping: Tensor,
) -> Tensor:
    num_tokens, total_heads, head_dim = qkv.shape
    k_cache, v_cache, fp8 = _as_bytes_if_fp8(cache)
    half = head_dim // 2
    heads = min(_HEADS, triton.next_power_of_2(total_heads))
    if num_tokens:
        launch(
            rope_and_cache_kernel,
            (num_tokens, triton.cdiv(total_heads, heads)),
            qkv,
            q_weight,
            k_weight,
            eps,
            cos_sin,
            k_cache,
            v_cache,
            slot_mapping,
            cache.k_scale,
            cache.v_scale,
            qkv.stride(0),
            qkv.stride(1),
            cos_sin.stride(0),
            *_cache_strides(cache),
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=cache.k.shape[2],
            HALF=half,
            BLOCK_SIZE=cache.k.shape[1],
            HEADS=heads,
            BLOCK=triton.next_power_of_2(half),
            FP8=fp8,
            num_warps=4,
        )
    return qkv[:, :num_heads]


def write_kv(k: Tensor, v: Tensor, cache: KVLayer, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot, as :func:`rope_and_cache` does. k, v: [T, num_kv_heads, D]."""
    num_tokens, num_kv_heads, head_dim = k.shape
    k_cache, v_cache, fp8 = _as_bytes_if_fp8(cache)
    heads = min(_HEADS // 2, triton.next_power_of_2(num_kv_heads))
    if num_tokens:
        launch(
            write_kv_kernel,
            (num_tokens, triton.cdiv(num_kv_heads, heads)),
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            cache.k_scale,
            cache.v_scale,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            *_cache_strides(cache),
            NUM_KV_HEADS=num_kv_heads,
            D=head_dim,
            BLOCK_SIZE=cache.k.shape[1],
            HEADS=heads,
            BLOCK=triton.next_power_of_2(head_dim),
            FP8=fp8,
            num_warps=4,
        )


def _as_bytes_if_fp8(cache: KVLayer) -> tuple[Tensor, Tensor, bool]:
    """Keys and values as the kernels store to them, and whether they are e4m3."""
    if cache.k.dtype == _FP8:
        return cache.k.view(torch.uint8), cache.v.view(torch.uint8), True
    if cache.k_scale != 1.0 or cache.v_scale != 1.0:
        raise ValueError(f"a cache of {cache.k.dtype} takes no scales")
    return cache.k, cache.v, False


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model: with the cache dtype of its shape."""
    qkv = torch.empty(
        (2, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim), dtype=shape.dtype, device="meta"
    )  # fmt: skip
    k, v = qkv[:, shape.num_heads : -shape.num_kv_heads], qkv[:, -shape.num_kv_heads :]
    cos_sin = torch.empty((2, shape.head_dim), dtype=torch.float32, device="meta")
    weight = torch.empty(shape.head_dim, dtype=shape.norm_dtype or shape.dtype, device="meta")
    slots = torch.empty(2, dtype=torch.int64, device="meta")
    per_layer = (2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    blocks = torch.empty((2, shape.num_layers, *per_layer), dtype=shape.cache_dtype, device="meta")
    cache = KVLayer(blocks[:, 0, 0], blocks[:, 0, 1])

    def calls() -> None:
        rope_and_cache(qkv, shape.num_heads, cos_sin, cache, slots)
        norm_rope_and_cache(qkv, shape.num_heads, weight, weight, 1e-6, cos_sin, cache, slots)
        write_kv(k, v, cache, slots)

    yield from record(properties, calls)
