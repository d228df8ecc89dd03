"""The interface of all device ops: what a model and a runner may call, whatever the device.

Three implementations: :class:`~flashserve_kernels.torch_ops.TorchOps` defines what each op means and runs anywhere,
``gpu.ops.TritonOps`` is Triton-lang, ``cpu.ops.NativeOps`` is C++. :func:`~flashserve_kernels.select.select_ops`
chooses one when a model loads, and layers keep it.

Shapes: T tokens of a step, R sequences, N rows of logits, D size of a head, V vocabulary. Tensors lie on the ops'
device, dtypes are the model's (bfloat16, float16, float32) unless said otherwise. No op looks at data on the host, so
a step of them can be captured once and replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from flashserve_kernels.attention import AttentionBatch
from flashserve_kernels.cpu.program import Program

LinearWeight = Any
"""A weight as the implementation reads it fastest; opaque."""
CacheLayer = Any
"""Keys and values of one layer; opaque."""


class Ops(Protocol):
    """Device ops. Methods whose names end in an underscore change their first argument."""

    name: str
    """For logs: what runs, such as ``native (avx512bf16)``."""
    captures: bool
    """Whether the device can capture a step of these ops (CUDA graphs)."""

    # --- weights -------------------------------------------------------------------------------------------------

    def packs(self, dtype: torch.dtype) -> bool:
        """Whether :meth:`pack_linear` makes a copy of a weight, so that the caller should drop the original."""
        ...

    def pack_linear(self, weight: Tensor, *, gated: bool = False, quantization: str | None = None) -> LinearWeight:
        """weight: [outputs, inputs]. gated: for :meth:`linear_silu_and_mul`. quantization: None or "int8" (weights per
        output, activations per row at run time). Raises ValueError for what the implementation lacks."""
        ...

    def linear(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``: [T, inputs] → [T, outputs]."""
        ...

    def linear_silu_and_mul(self, x: Tensor, weight: LinearWeight, bias: Tensor | None = None) -> Tensor:
        """SwiGLU (Shazeer, 2020): ``silu(gate) * up`` of a linear whose outputs are all gates, then all ups:
        [T, inputs] → [T, outputs / 2]."""
        ...

    def logits(self, hidden: Tensor, weight: LinearWeight) -> Tensor:
        """The language-model head: [N, hidden] → [N, V], in the dtype that :meth:`sample` likes best."""
        ...

    # --- rows ----------------------------------------------------------------------------------------------------

    def embedding(self, table: Tensor, ids: Tensor) -> Tensor:
        """Rows of a table of any dtype: [V, D], ids [T] int64 → [T, D]."""
        ...

    def add_embedding_(self, x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
        """``x += table[ids]``; returns x."""
        ...

    def gather_tokens(self, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
        """A step's input tokens: ``token_ids`` [T] int64, where negative ``last_tokens[slots]``. last_tokens: [slots]
        int64, slots: [T] int64. Returns [T] int64."""
        ...

    def scatter_tokens_(self, last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
        """``last_tokens[slots] = tokens``. slots: [N] int64, all different or with equal tokens; tokens: [N] int64."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
        """``x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, 2019) over the last dimension; x: any strides,
        out may be x."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual). Both inputs may be overwritten; the sum may be float32."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """``(x - mean) / sqrt(var + eps) * weight + bias`` (Ba et al., 2016)."""
        ...

    def add_layer_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`add_rms_norm`."""
        ...

    def gelu_tanh(self, x: Tensor) -> Tensor:
        """GELU's tanh form (Hendrycks and Gimpel, 2016)."""
        ...

    # --- attention -----------------------------------------------------------------------------------------------

    def allocate_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        cache_dtype: torch.dtype,
    ) -> Sequence[CacheLayer]:
        """The paged KV cache, zeroed. The layout is private; others know block ids. A token's slot is
        ``block id * block_size + offset``.

        dtype: of the keys; cache_dtype: the same, or 8 bits: int8 on a CPU, float8_e4m3fn on a GPU. Raises ValueError
        for what the implementation lacks.
        """
        ...

    def rope_and_cache(
        self, qkv: Tensor, num_heads: int, cos_sin: Tensor, cache: CacheLayer, slot_mapping: Tensor
    ) -> Tensor:
        """Rotate queries and keys (Su et al., 2021; half-split), store keys and values.

        qkv: [T, heads + 2 KV heads, D]: queries, keys, values; cos_sin: [T, D] float32: cosines, then sines;
        slot_mapping: [T] int64, -1: not stored. Returns the queries, a view [T, heads, D].
        """
        ...

    def write_kv(self, k: Tensor, v: Tensor, cache: CacheLayer, slot_mapping: Tensor) -> None:
        """Store keys and values, [T, KV heads, D], any strides."""
        ...

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
        ...

    # --- sampling ------------------------------------------------------------------------------------------------

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
        """One token for each row, with the noise of (seed, position, token) alone.

        logits: [N, V], may be overwritten; temperature: [N] float32, 0 is greedy; min_p: [N] float32, 0 is off; top_k:
        [N] int64, 0 is off; top_p: [N] float32, 1 is off; seeds, positions: [N] int64. Returns [N] int64.
        """
        ...


@runtime_checkable
class RecordingOps(Ops, Protocol):
    """Ops whose steps are recorded into programs, the CPU's counterpart of CUDA graphs."""

    def new_program(self, capacity: tuple[int, int, int]) -> Program:
        """Something to record a step into, with room for that many tokens, sequences and rows of logits."""
        ...
