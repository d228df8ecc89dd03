"""What decoders are composed of: layers over one residual stream, and the last norm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from flashserve.layers.attention import StepBatch
from flashserve.layers.rotary import RotaryEmbedding
from flashserve_kernels import AttentionBatch, CacheLayer, Ops


class Norm(Protocol):
    """RMSNorm or LayerNorm."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); both may be overwritten."""
        ...


AttentionLayer = Callable[[Tensor, CacheLayer, StepBatch], Tensor]
FeedForward = Callable[[Tensor], Tensor]


class PostNormed:
    """A layer whose output is normed before it joins the residual stream, as in Gemma 2 and 3."""

    def __init__(self, layer: Callable[..., Tensor], norm: Norm) -> None:
        self._layer, self._norm = layer, norm

    def __call__(self, x: Tensor, *rest: Any) -> Tensor:
        return self._norm(self._layer(x, *rest))


class DecoderLayer:
    """Attention and feed-forward, each behind a norm and added to the residual stream. The add after each half is left
    to the next norm, which does both in one op."""

    def __init__(
        self, attention_norm: Norm, attention: AttentionLayer, feed_forward_norm: Norm, feed_forward: FeedForward
    ) -> None:
        self._attention_norm, self._attention = attention_norm, attention
        self._feed_forward_norm, self._feed_forward = feed_forward_norm, feed_forward

    def __call__(self, x: Tensor, residual: Tensor | None, cache: CacheLayer, step: StepBatch) -> tuple[Tensor, Tensor]:
        """x: the last layer's output, [T, hidden], still to be added to ``residual``. Returns the same pair."""
        if residual is None:
            x, residual = self._attention_norm(x), x
        else:
            x, residual = self._attention_norm.add(x, residual)
        x = self._attention(x, cache, step)
        x, residual = self._feed_forward_norm.add(x, residual)
        return self._feed_forward(x), residual


class DecoderStack:
    """All layers of a model."""

    def __init__(
        self, ops: Ops, layers: Sequence[DecoderLayer], norm: Norm, rotaries: Sequence[RotaryEmbedding] = ()
    ) -> None:
        """rotaries: those that the layers' attentions have."""
        self._ops, self._layers, self._norm, self._rotaries = ops, layers, norm, rotaries

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        attention: AttentionBatch,
        logits_rows: Tensor,
        kv_cache: Sequence[CacheLayer],
    ) -> Tensor:
        """x: [T, hidden], the embedded tokens; positions: [T] int64; logits_rows: [N] int64, the tokens whose hidden
        states are wanted. Returns [N, hidden]."""
        step = StepBatch(attention, {rotary: rotary(positions) for rotary in self._rotaries})
        residual = None
        for layer, cache in zip(self._layers, kv_cache, strict=True):
            x, residual = layer(x, residual, cache, step)
        assert residual is not None
        return self._norm.add(self._ops.embedding(x, logits_rows), self._ops.embedding(residual, logits_rows))[0]
