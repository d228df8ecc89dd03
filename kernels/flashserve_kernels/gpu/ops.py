"""The ops in Triton-lang, with cuBLAS for matrix products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from flashserve_kernels import kv_cache, linear
from flashserve_kernels.activation import Activation
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.gpu import (
    attention,
    block_copy,
    embedding,
    grouped,
    invariant_linear,
    logprobs,
    norm,
    penalties,
    rope_cache,
    sampling,
    token_mask,
)
from flashserve_kernels.gpu.activation import activate, activate_and_mul, soft_cap_
from flashserve_kernels.gpu.few_rows import FewRows, seconds_on
from flashserve_kernels.gpu.grouped import Panels
from flashserve_kernels.grouped import GroupedRows
from flashserve_kernels.kv_cache import KVCacheSpec, KVLayer
from flashserve_kernels.logprobs import Logprobs
from flashserve_kernels.ops import LinearWeight, Ops

Weight = Tensor | tuple[Panels, ...]


class TritonOps(Ops):
    """Steps of these ops can be captured into CUDA graphs: no op looks at data on the host."""

    name = "Triton-lang"
    captures = True
    weight_formats = frozenset({"grouped"})

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._arrivals = attention.new_arrivals(device)
        self._few_rows = FewRows(self._arrivals, partial(seconds_on, device) if device.type == "cuda" else None)

    def pack_linear(self, weight: Tensor | GroupedRows, *, gated: bool = False, int8: bool = False) -> Weight:
        if isinstance(weight, Tensor):
            packed: Tensor = super().pack_linear(weight, gated=gated, int8=int8)
            return packed
        return grouped.pack(weight, self.device)

    def linear(self, x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, Tensor):
            return self._few_rows.linear(x, weight, bias, None, lambda: linear.linear(x, weight, bias))
        return grouped.linear(x, weight, bias)

    def linear_gated(self, x: Tensor, weight: Weight, activation: Activation, bias: Tensor | None = None) -> Tensor:
        def in_two() -> Tensor:
            return activate_and_mul(self.linear(x, weight, bias), activation)

        if isinstance(weight, Tensor):
            return self._few_rows.linear(x, weight, bias, activation, in_two)
        return in_two()

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return activate(x, activation)

    def logits(self, hidden: Tensor, weight: Weight, softcap: float | None = None) -> Tensor:
        logits = self.linear(hidden, weight)
        return logits if softcap is None else soft_cap_(logits, softcap)

    def packed_embedding(
        self, weight: tuple[Panels, ...], ids: Tensor, dtype: torch.dtype, scale: float = 1.0
    ) -> Tensor:
        return grouped.embedding(weight, ids, dtype, scale)

    def embedding(self, table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        return embedding.embedding(table, ids, scale)

    def add_embedding_(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return embedding.add_embedding_(x, table, ids)

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        return embedding.gather_tokens(token_ids, last_tokens, slots)

    def scatter_tokens_(self, last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
        embedding.scatter_tokens_(last_tokens, slots, tokens)

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

    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        if spec.block_size & (spec.block_size - 1):
            raise ValueError(
                f"the kernels in Triton-lang need a block size that is a power of two, not {spec.block_size}"
            )
        if spec.cache_dtype not in (spec.dtype, torch.float8_e4m3fn):
            raise ValueError(f"a GPU stores keys and values in {spec.dtype} or float8_e4m3fn, not {spec.cache_dtype}")
        return kv_cache.block_bytes(spec)

    def rope_and_cache(
        self, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: KVLayer, slot_mapping: Tensor
    ) -> Tensor:
        return rope_cache.rope_and_cache(qkv, num_heads, cos_sin, cache, slot_mapping)

    def norm_rope_and_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        cache: KVLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        return rope_cache.norm_rope_and_cache(qkv, num_heads, q_weight, k_weight, eps, cos_sin, cache, slot_mapping)

    def write_kv(self, k: Tensor, v: Tensor, cache: KVLayer, slot_mapping: Tensor) -> None:
        rope_cache.write_kv(k, v, cache, slot_mapping)

    def copy_blocks(self, cache: Sequence[KVLayer], pairs: Tensor) -> None:
        first = cache[0].k
        if first.is_contiguous():  # the layout of a CPU, where Triton's interpreter runs
            pieces = [blocks for layer in cache for blocks in (layer.k, layer.v)]
        else:  # all layers of a block lie together, the first one's keys in front
            pieces = [first.as_strided((first.shape[0], first.stride(0)), (first.stride(0), 1))]
        for blocks in pieces:
            block_copy.copy_blocks(blocks, blocks, pairs)

    def paged_attention(
        self,
        q: Tensor,
        cache: KVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        invariant = self.is_batch_invariant
        return attention.paged_attention(
            q, cache, batch, scale, window, softcap, arrivals=self._arrivals, batch_invariant=invariant
        )

    def apply_penalties_(
        self,
        logits: Tensor,
        slots: Tensor,
        counts: Tensor,
        in_prompt: Tensor,
        repetition: Tensor,
        presence: Tensor,
        frequency: Tensor,
    ) -> None:
        penalties.apply_penalties_(logits, slots, counts, in_prompt, repetition, presence, frequency)

    def count_tokens_(self, counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
        penalties.count_tokens_(counts, slots, tokens)

    def mask_logits_(self, logits: Tensor, bits: Tensor, rows: Tensor) -> None:
        token_mask.mask_logits_(logits, bits, rows)

    _sample_rows = staticmethod(sampling.sample_rows)

    def log_probabilities(self, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        return logprobs.log_probabilities(logits, tokens, num_top)


class BatchInvariantOps(TritonOps):
    """A token's numbers depend on nothing but its own sequence: products with one tile for any number of rows, and
    attention with one tile for prompts and decodes, whose keys are never split. Norms, softmax and sampling of a row
    are one program's, or slices of fixed size, in all ops."""

    name = "Triton-lang, batch-invariant"
    is_batch_invariant = True
    weight_formats: frozenset[str] = frozenset()

    def packs(self, dtype: torch.dtype) -> bool:
        return False

    def pack_linear(self, weight: Tensor | GroupedRows, *, gated: bool = False, int8: bool = False) -> Weight:
        if int8 or not isinstance(weight, Tensor):
            raise ValueError("batch-invariant products take full weights only")
        return weight

    def linear(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        return invariant_linear.linear(x, weight, bias)

    def linear_gated(
        self, x: Tensor, weight: LinearWeight, activation: Activation, bias: Tensor | None = None
    ) -> Tensor:
        return activate_and_mul(self.linear(x, weight, bias), activation)
