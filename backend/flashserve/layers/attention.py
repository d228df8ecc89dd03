"""Self-attention over the paged KV cache."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flashserve.layers.linear import Linear
from flashserve.layers.norm import RMSNorm
from flashserve_kernels import AttentionBatch, CacheLayer, Ops


@dataclass(frozen=True)
class Attention:
    """Projections around paged attention. Query head h reads KV head ``h // (num_heads / num_kv_heads)``."""

    ops: Ops
    qkv_proj: Linear
    o_proj: Linear
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    """Tokens that a query sees, itself included; None: all earlier ones."""
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, x: Tensor, cos_sin: Tensor | None, cache: CacheLayer, batch: AttentionBatch) -> Tensor:
        """x: [T, hidden]; cos_sin: [T, head_dim] float32, None without rotary positions. Returns [T, hidden]."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm(q, out=q)
            self.k_norm(k, out=k)
        if cos_sin is not None:
            self.ops.rope_and_cache(qkv, heads, cos_sin, cache, batch.slot_mapping)
        else:
            self.ops.write_kv(k, v, cache, batch.slot_mapping)
        return self.o_proj(self.ops.paged_attention(q, cache, batch, self.head_dim**-0.5, self.window))
