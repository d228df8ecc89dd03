"""The ops in C++, for a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashserve_kernels.activation import Activation
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.cpu import attention, elementwise, grouped, kv_cache, linear, norm, sampling, token_mask, tokens
from flashserve_kernels.cpu.grouped import PackedGrouped, PackedParts
from flashserve_kernels.cpu.kv_cache import PackedKVLayer
from flashserve_kernels.cpu.linear import PackedLinear
from flashserve_kernels.cpu.program import Pool, Program
from flashserve_kernels.grouped import GroupedRows
from flashserve_kernels.kv_cache import KVCacheSpec
from flashserve_kernels.logprobs import Logprobs
from flashserve_kernels.ops import Ops, SamplerColumns
from flashserve_kernels.sampling import Stage

Packed = PackedLinear | PackedGrouped | PackedParts


class NativeOps(Ops):
    """One pool of threads and the instruction set that it runs. Use from one thread."""

    records = True
    weight_formats = frozenset({"grouped", "int8"})

    def __init__(self, isa: str, num_threads: int, cpus: list[int] | None = None) -> None:
        """cpus: one CPU number per thread to pin it to. Raises NativeUnavailable where the library cannot be had."""
        super().__init__(torch.device("cpu"))
        self.name = f"native ({isa})"
        self._pool = Pool(isa, num_threads, cpus)

    def new_program(self, capacity: tuple[int, int, int]) -> Program:
        return Program(self._pool, capacity)

    def packs(self, dtype: torch.dtype) -> bool:
        return True

    def pack_linear(self, weight: Tensor | GroupedRows, *, gated: bool = False, int8: bool = False) -> Packed:
        if isinstance(weight, Tensor):
            return linear.pack_linear(self._pool, weight, gated=gated, quantize=int8)
        return grouped.pack(self._pool, weight, gated)

    def linear(self, x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedLinear):
            return linear.linear(self._pool, x, weight, bias)
        return grouped.linear(self._pool, x, weight, bias)

    def linear_gated(self, x: Tensor, weight: Packed, activation: Activation, bias: Tensor | None = None) -> Tensor:
        if isinstance(weight, PackedLinear):
            return linear.linear_gated(self._pool, x, weight, activation, bias)
        return grouped.linear_gated(self._pool, x, weight, activation, bias)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        return elementwise.activate(self._pool, x, activation)

    def logits(self, hidden: Tensor, weight: Packed, softcap: float | None = None) -> Tensor:
        if isinstance(weight, PackedLinear):
            logits = linear.linear(self._pool, hidden, weight, out_dtype=torch.float32)
        else:
            logits = grouped.linear(self._pool, hidden, weight, out_dtype=torch.float32)
        return logits if softcap is None else elementwise.soft_cap_(self._pool, logits, softcap)

    def packed_embedding(self, weight: PackedGrouped, ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return grouped.embedding(self._pool, weight, ids, dtype, scale)

    def embedding(self, table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        return elementwise.embedding(self._pool, table, ids, scale)

    def add_embedding_(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        return elementwise.add_embedding_(self._pool, x, table, ids)

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        return tokens.gather_tokens(self._pool, token_ids, last_tokens, slots)

    def scatter_tokens_(self, last_tokens: Tensor, slots: Tensor, sampled: Tensor) -> None:
        tokens.scatter_tokens_(self._pool, last_tokens, slots, sampled)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        return norm.rms_norm(self._pool, x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return norm.add_rms_norm(self._pool, x, residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return norm.layer_norm(self._pool, x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return norm.add_layer_norm(self._pool, x, residual, weight, bias, eps)

    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        return kv_cache.packed_block_bytes(spec)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> Sequence[PackedKVLayer]:
        return kv_cache.allocate_packed_kv_cache(spec, num_blocks)

    def rope_and_cache(
        self, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: PackedKVLayer, slot_mapping: Tensor
    ) -> Tensor:
        return kv_cache.rope_and_cache(self._pool, qkv, num_heads, cos_sin, cache, slot_mapping)

    def write_kv(self, k: Tensor, v: Tensor, cache: PackedKVLayer, slot_mapping: Tensor) -> None:
        kv_cache.write_kv(self._pool, k, v, cache, slot_mapping)

    def copy_blocks(self, cache: Sequence[PackedKVLayer], pairs: Tensor) -> None:
        kv_cache.copy_blocks(cache, pairs)

    def paged_attention(
        self,
        q: Tensor,
        cache: PackedKVLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        return attention.paged_attention(self._pool, q, cache, batch, scale, window, softcap)

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
        sampling.apply_penalties_(self._pool, logits, slots, counts, in_prompt, repetition, presence, frequency)

    def count_tokens_(self, counts: Tensor, slots: Tensor, sampled: Tensor) -> None:
        sampling.count_tokens_(self._pool, counts, slots, sampled)

    def mask_logits_(self, logits: Tensor, bits: Tensor, rows: Tensor) -> None:
        token_mask.mask_logits_(self._pool, logits, bits, rows)

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor, state: SamplerColumns, stages: Stage) -> Tensor:
        return sampling.sample_rows(self._pool, logits, slots, positions, stages, **state)

    def log_probabilities(self, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        return sampling.log_probabilities(self._pool, logits, tokens, num_top)
