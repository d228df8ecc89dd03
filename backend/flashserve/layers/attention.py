"""Self-attention over the paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from flashserve.layers.linear import Linear
from flashserve.layers.norm import RMSNorm
from flashserve.layers.rotary import RotaryEmbedding
from flashserve_kernels import AttentionBatch, CacheLayer, Ops


@dataclass(frozen=True)
class StepBatch:
    """What the layers of a step share."""

    attention: AttentionBatch
    cos_sin: Mapping[RotaryEmbedding, Tensor]
    """[T, head_dim] float32 of the step's positions, computed once for all layers that have the embedding."""


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
    """Of each query head; with ``k_norm`` of the same eps, and before a rotary embedding."""
    k_norm: RMSNorm | None = None
    rotary: RotaryEmbedding | None = None
    """None: positions come from elsewhere."""
    scale: float | None = None
    """Of the scores; None: ``head_dim ** -0.5``."""
    softcap: float | None = None
    """``c · tanh(score / c)``."""

    def __post_init__(self) -> None:
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        if norms and (len(norms) == 1 or self.rotary is None or norms[0].eps != norms[1].eps):
            raise ValueError("queries and keys are normed both, with one eps, and before a rotary embedding")

    def __call__(self, x: Tensor, cache: CacheLayer, step: StepBatch) -> Tensor:
        """x: [T, hidden]. Returns [T, hidden]."""
        batch = step.attention
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self.qkv_proj(x).view(-1, heads + 2 * kv_heads, self.head_dim)
        q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.rotary is None:
            self.ops.write_kv(k, v, cache, batch.slot_mapping)
        elif self.q_norm is None or self.k_norm is None:
            self.ops.rope_and_cache(qkv, heads, step.cos_sin[self.rotary], cache, batch.slot_mapping)
        else:
            weights = self.q_norm.weight, self.k_norm.weight, self.q_norm.eps
            self.ops.norm_rope_and_cache(qkv, heads, *weights, step.cos_sin[self.rotary], cache, batch.slot_mapping)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return self.o_proj(self.ops.paged_attention(q, cache, batch, scale, self.window, self.softcap))
