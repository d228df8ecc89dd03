"""The ops: whatever a model and a runner may ask of a device, and what each means, in torch.

:class:`Ops` runs anywhere and is the reference of the others: ``gpu.ops.TritonOps`` overrides it in Triton-lang,
``cpu.ops.NativeOps`` in C++. :func:`~flashserve_kernels.select.select_ops` chooses one when a model loads, and layers
keep it.

Shapes: T tokens of a step, R sequences, N rows of logits, D size of a head, V vocabulary. Tensors lie on the ops'
device, dtypes are the model's (bfloat16, float16, float32) unless said otherwise. Methods whose names end in an
underscore change their first argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flashserve_kernels import (
    attention,
    embedding,
    kv_cache,
    linear,
    logprobs,
    norm,
    penalties,
    rotary,
    sampling,
    token_mask,
)
from flashserve_kernels.activation import Activation, activate, activate_and_mul, soft_cap_
from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.grouped import GroupedRows
from flashserve_kernels.kv_cache import KVCacheSpec
from flashserve_kernels.logprobs import Logprobs
from flashserve_kernels.recording import StepProgram
from flashserve_kernels.sampling import Stage

LinearWeight = Any
"""A weight as the implementation reads it fastest; opaque."""
CacheLayer = Any
"""Keys and values of one layer; opaque."""
SamplerColumns = Mapping[str, Tensor]
"""The sampler's state by name: [slots, ...], any stride, what each slot's request asks for or has come to."""


class Ops:
    """Device ops in torch. Attention and sampling read numbers on the host here, so steps cannot be captured."""

    name = "torch"
    """For logs: what runs, such as ``native (avx512bf16)``."""
    captures = False
    """Whether the device can capture a step of these ops (CUDA graphs): then no op looks at data on the host."""
    records = False
    """Whether :meth:`new_program` gives something to record steps into."""
    is_batch_invariant = False
    """Whether a token's numbers depend on its own sequence alone, to the last bit, and not on the rest of a step."""
    weight_formats: frozenset[str] = frozenset()
    """What :meth:`pack_linear` takes beside full weights. grouped: weights in groups; int8: full weights, which it
    quantises per output."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def new_program(self, capacity: tuple[int, int, int]) -> StepProgram:
        """Something to record a step into, with room for that many tokens, sequences and rows of logits."""
        raise NotImplementedError(f"steps of {self.name} ops cannot be recorded")

    # --- weights -------------------------------------------------------------------------------------------------

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`pack_linear` makes a copy of a weight, so that the caller should drop the original."""
        return linear.packing_pays(dtype, self.device)

    def pack_linear(self, weight: Tensor | GroupedRows, *, gated: bool = False, int8: bool = False) -> LinearWeight:
        """weight: [outputs, inputs]. gated: for :meth:`linear_gated`. int8: weights per output, activations per
        row at run time. With a weight in groups a CPU quantises activations to int8 per row and group
        (``grouped.linear``). Raises ValueError for what is not in ``weight_formats``."""
        if int8 or not isinstance(weight, Tensor):
            raise ValueError("weights in int8 need the native kernels of a CPU, weights in groups these or a GPU")
        return linear.pack_linear(weight)

    def linear(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``: [T, inputs] → [T, outputs]."""
        return linear.linear(x, weight, bias)

    def linear_gated(
        self, x: Tensor, weight: LinearWeight, activation: Activation, bias: Tensor | None = None
    ) -> Tensor:
        """A gated linear unit (Shazeer, 2020): ``activation(gate) * up`` of a linear whose outputs are all gates, then
        all ups: [T, inputs] → [T, outputs / 2]."""
        return activate_and_mul(self.linear(x, weight, bias), activation)

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """x: [T, I]. Returns [T, I]."""
        return activate(x, activation)

    def logits(self, hidden: Tensor, weight: LinearWeight, softcap: float | None = None) -> Tensor:
        """The language-model head: [N, hidden] → [N, V], in the dtype that :meth:`sample` likes best.
        softcap: ``c · tanh(logit / c)``."""
        logits = self.linear(hidden, weight)
        return logits if softcap is None else soft_cap_(logits, softcap)

    # --- rows ----------------------------------------------------------------------------------------------------

    def embedding(self, table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        """Rows of a table, multiplied with ``scale``: [V, D], ids [T] int64 → [T, D]. Of any dtype, if scale is 1."""
        return embedding.embedding(table, ids, scale)

    def packed_embedding(self, weight: LinearWeight, ids: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        """Rows of a weight in groups that :meth:`pack_linear` made, times scale: ids [T] int64 → [T, inputs]."""
        raise ValueError("weights in groups need the native kernels of a CPU, or a GPU")

    def add_embedding_(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """``x += table[ids]``; returns x."""
        return embedding.add_embedding_(x, table, ids)

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        """A step's input tokens: ``token_ids`` [T] int64, where negative ``last_tokens[slots]``. last_tokens: [slots]
        int64, slots: [T] int64. Returns [T] int64."""
        return embedding.gather_tokens(token_ids, last_tokens, slots)

    def scatter_tokens_(self, last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
        """``last_tokens[slots] = tokens``. slots: [N] int64, all different or with equal tokens; tokens: [N] int64."""
        last_tokens.index_copy_(0, slots, tokens)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """``x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, 2019) over the last dimension; x: any strides,
        out may be x; weight: x's dtype or float32."""
        return norm.rms_norm(x, weight, eps, out)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual). Both inputs may be overwritten; the sum may be float32."""
        return norm.add_rms_norm(x, residual, weight, eps)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al., 2016)."""
        return norm.layer_norm(x, weight, bias, eps)

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`add_rms_norm`."""
        return norm.add_layer_norm(x, residual, weight, bias, eps)

    # --- attention -----------------------------------------------------------------------------------------------

    def kv_block_bytes(self, spec: KVCacheSpec) -> int:
        """What :meth:`allocate_kv_cache` takes for each block, over all layers. Raises ValueError for a block size,
        head or dtype that the implementation lacks."""
        if spec.cache_dtype != spec.dtype:
            raise ValueError(f"torch's own ops store keys and values in {spec.dtype} only, not in {spec.cache_dtype}")
        return kv_cache.block_bytes(spec)

    def allocate_kv_cache(self, spec: KVCacheSpec, num_blocks: int) -> Sequence[CacheLayer]:
        """The paged KV cache, zeroed, one entry per layer. The layout is private; others know block ids. A token's
        slot is ``block id * block_size + offset``. Raises ValueError as :meth:`kv_block_bytes` does."""
        self.kv_block_bytes(spec)
        return kv_cache.allocate_kv_cache(spec, num_blocks, self.device)

    def rope_and_cache(
        self, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: CacheLayer, slot_mapping: Tensor
    ) -> Tensor:
        """Rotate queries and keys (Su et al., 2021; half-split), store keys and values.

        qkv: [T, heads + 2 KV heads, D]: queries, keys, values; cos_sin: [T, D] float32: cosines, then sines;
        slot_mapping: [T] int64, -1: not stored. Returns the queries, a view [T, heads, D].
        """
        return rotary.rope_and_cache(qkv, num_heads, cos_sin, cache, slot_mapping)

    def norm_rope_and_cache(
        self,
        qkv: Tensor,
        num_heads: int,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos_sin: Tensor,
        cache: CacheLayer,
        slot_mapping: Tensor,
    ) -> Tensor:
        """As :meth:`rope_and_cache`, with :meth:`rms_norm` of each query and each key first, in place.

        q_weight, k_weight: [D], qkv's dtype or float32.
        """
        num_kv_heads = (qkv.shape[1] - num_heads) // 2
        q, k = qkv[:, :num_heads], qkv[:, num_heads : num_heads + num_kv_heads]
        self.rms_norm(q, q_weight, eps, out=q)
        self.rms_norm(k, k_weight, eps, out=k)
        return self.rope_and_cache(qkv, num_heads, cos_sin, cache, slot_mapping)

    def write_kv(self, k: Tensor, v: Tensor, cache: CacheLayer, slot_mapping: Tensor) -> None:
        """Store keys and values, [T, KV heads, D], any strides; slot_mapping: [T] int64, -1: not stored."""
        kv_cache.write_kv(k, v, cache, slot_mapping)

    def copy_blocks(self, cache: Sequence[CacheLayer], pairs: Tensor) -> None:
        """Copy whole blocks between steps: ``pairs[i, 1]`` becomes what ``pairs[i, 0]`` is, in all layers of what
        :meth:`allocate_kv_cache` gave. pairs: [N, 2] int64; no block is written twice, or written and read."""
        kv_cache.copy_blocks(cache, pairs)

    def paged_attention(
        self,
        q: Tensor,
        cache: CacheLayer,
        batch: AttentionBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """``softmax(cap(q kᵀ · scale)) v`` over each token's own sequence up to itself.

        q: [T, heads, D], any strides. window: tokens that a query sees, itself included. softcap: ``c · tanh(s / c)``.
        Returns [T, heads * D].
        """
        return attention.paged_attention(q, cache, batch, scale, window, softcap)

    # --- sampling ------------------------------------------------------------------------------------------------

    def mask_logits_(self, logits: Tensor, bits: Tensor, rows: Tensor) -> None:
        """Leave rows some tokens only: ``logits[rows[m], t] = -inf`` where bit ``t`` of ``bits[m]`` is 0. logits:
        [N, V]; bits: [M, at least V / 32] int32, the lowest bit first; rows: [M] int64, all different."""
        token_mask.mask_logits_(logits, bits, rows)

    def mask_tokens_(self, logits: Tensor, rows: Tensor, tokens: Tensor) -> None:
        """Rule out single tokens: ``logits[rows[i], tokens[i]] = -inf``. rows, tokens: int64, of one length."""
        sampling.mask_tokens_(logits, rows, tokens)

    def add_bias_(self, logits: Tensor, rows: Tensor, tokens: Tensor, values: Tensor) -> None:
        """``logits[rows[i], tokens[i]] += values[i]``; -inf rules a token out. rows, tokens: int64, values: float32, of
        one length; a pair may occur several times."""
        penalties.add_bias_(logits, rows, tokens, values)

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
        """Penalise what the prompt and the output of a row's slot hold (``penalties.apply_penalties_``).

        logits: [N, V]; slots: [N] int64, -1: no penalties; counts: [slots, V] int32; in_prompt: [slots, V] bool;
        repetition, presence, frequency: [N] float32.
        """
        penalties.apply_penalties_(logits, slots, counts, in_prompt, repetition, presence, frequency)

    def count_tokens_(self, counts: Tensor, slots: Tensor, tokens: Tensor) -> None:
        """``counts[slots[r], tokens[r]] += 1``; slots: [R] int64, -1: not counted; tokens: [R] int64."""
        penalties.count_tokens_(counts, slots, tokens)

    def exclude_top_choices_(
        self,
        logits: Tensor,
        rows: Tensor,
        temperature: Tensor,
        probability: Tensor,
        threshold: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> None:
        """XTC (``penalties.exclude_top_choices_``). rows: [M] int64, all different; seeds, positions: [M] int64; the
        others: [M] float32."""
        penalties.exclude_top_choices_(logits, rows, temperature, probability, threshold, seeds, positions)

    _sample_rows = staticmethod(sampling.sample_rows)
    """What :meth:`sample` calls, with a keyword for each parameter."""

    def sample(self, logits: Tensor, slots: Tensor, positions: Tensor, state: SamplerColumns, stages: Stage) -> Tensor:
        """One token for each row, by the parameters of its slot and with the noise of (seed, position, token) alone.

        logits: [N, V], may be overwritten; slots, positions: [N] int64. state: what the stages read, under the names of
        :func:`~flashserve_kernels.sampling.sample_rows`. stages: those that any of the rows needs; what others would
        read is not looked at. Returns [N] int64.
        """
        return self._sample_rows(logits, slots, positions, stages, **state)

    def log_probabilities(self, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
        """Of softmax(logits): each row's token, its rank, and the ``num_top`` most probable tokens.

        logits: [N, V]; tokens: [N] int64. Raises ValueError unless num_top is in 0 .. min(20, V).
        """
        return logprobs.log_probabilities(logits, tokens, num_top)
