"""The ops in torch: what each means, and the fallback for every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashserve_kernels import activation, attention, embedding, kv_cache, linear, norm, rotary, sampling
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.kv_cache import KVLayer


class TorchOps:
    """Implements Ops. Attention and sampling read numbers on the host, so steps cannot be captured."""

    name = "torch"
    captures = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def packs(self, dtype: torch.dtype) -> bool:
        return linear.packing_pays(dtype, self.device)

    def pack_linear(self, weight: Tensor, *, gated: bool = False, quantization: str | None = None) -> Tensor:
        if quantization is not None:
            raise ValueError(f"quantization {quantization!r} needs the native kernels of a CPU")
        return linear.pack_linear(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear.linear(x, weight, bias)

    def linear_silu_and_mul(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return activation.silu_and_mul(linear.linear(x, weight, bias))

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return linear.linear(hidden, weight)

    def embedding(self, table: Tensor, ids: Tensor) -> Tensor:
        return embedding.embedding(table, ids)

    def add_embedding_(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return embedding.add_embedding_(x, table, ids)

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        return embedding.gather_tokens(token_ids, last_tokens, slots)

    def scatter_tokens_(self, last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
        last_tokens.index_copy_(0, slots, tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return norm.rms_norm(x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(x, residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return norm.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm.add_layer_norm(x, residual, weight, bias, eps)

    def gelu_tanh(self, x: Tensor) -> Tensor:
        return activation.gelu_tanh(x)

    def allocate_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> Sequence[KVLayer]:
        if cache_dtype != dtype:
            raise ValueError(f"a KV cache of {cache_dtype} needs a GPU or the native kernels")
        return kv_cache.allocate_kv_cache(
            num_layers, num_blocks, block_size, num_kv_heads, head_dim, dtype, self.device
        )

    def rope_and_cache(
        self, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: KVLayer, slot_mapping: Tensor
    ) -> Tensor:
        return rotary.rope_and_cache(qkv, num_heads, cos_sin, cache, slot_mapping)

    def write_kv(self, k: Tensor, v: Tensor, cache: KVLayer, slot_mapping: Tensor) -> None:
        kv_cache.write_kv(k, v, cache, slot_mapping)

    def paged_attention(
        self,
        q: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        return attention.paged_attention(q, cache, batch, scale, window, softcap)

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        min_p: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        return sampling.sample_rows(logits, temperature, min_p, top_k, top_p, seeds, positions)
