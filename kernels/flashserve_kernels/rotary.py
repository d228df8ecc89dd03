"""Rotary position embedding (Su et al., 2021), half-split as in GPT-NeoX and Llama, fused with the KV write."""

from __future__ import annotations

from torch import Tensor

from flashserve_kernels.kv_cache import KVLayer, write_kv


def rotary_embedding_(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate every head in place: ``(a, b) -> (a cos - b sin, b cos + a sin)`` for the halves a, b of a head.

    x: [T, H, D], any strides; cos_sin: [T, D] float32, the token's D/2 cosines, then its D/2 sines. The products
    are float32 in every dtype. Returns x.
    """
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    rotated_a = (a * cos).addcmul_(b, sin, value=-1)
    rotated_b = (b * cos).addcmul_(a, sin)
    a.copy_(rotated_a)
    b.copy_(rotated_b)
    return x


def rope_and_cache(qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: KVLayer, slot_mapping: Tensor) -> Tensor:
    """Rotate queries and keys in place, store keys and values in their slots, return the queries.

    qkv: [T, num_heads + 2 num_kv_heads, D], in the order queries, keys, values; cos_sin: [T, D] float32;
    slot_mapping: [T] int64. Returns the view [T, num_heads, D] of qkv.
    """
    num_kv_heads = cache.k.shape[2]
    rotary_embedding_(qkv[:, : num_heads + num_kv_heads], cos_sin)
    k, v = qkv[:, num_heads : num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads :]
    write_kv(k, v, cache, slot_mapping)
    return qkv[:, :num_heads]
