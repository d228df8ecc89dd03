"""What a model gets for a step, and the shape that every model has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from flashserve.layers.weight_source import WeightSource
from flashserve_kernels import AttentionBatch, CacheLayer


@dataclass(frozen=True)
class ModelInput:
    """A step's tokens, packed without padding: T tokens of R sequences."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64, each token's place in its own sequence."""
    attention: AttentionBatch
    """Where the tokens' keys and values go, and what each token sees."""
    logits_rows: Tensor
    """[N] int64: the tokens whose logits are wanted."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes that memory planning needs."""

    context_len: int
    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int


class CausalLM(Protocol):
    """A model. Building it loads its weights; ``context_len`` is the number of positions it must be ready for."""

    embedding_names: ClassVar[tuple[str, ...]]
    """Names under which checkpoints hold the token embedding."""
    tied_by_default: ClassVar[bool]
    """Whether the head is that table where config.json says nothing of it."""

    def __init__(self, config: dict[str, Any], weights: WeightSource, context_len: int) -> None: ...

    @staticmethod
    def read_shape(config: dict[str, Any]) -> ModelShape:
        """From config.json. Raises ConfigError for settings that the model does not implement."""
        ...

    @staticmethod
    def ignored_weights(config: dict[str, Any]) -> tuple[str, ...]:
        """Patterns (fnmatch) of checkpoint tensors that hold nothing the model needs."""
        ...

    def forward(self, inputs: ModelInput, kv_cache: Sequence[CacheLayer]) -> Tensor:
        """Hidden states of the rows whose logits are wanted, after the last norm: [N, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [N, hidden]. Returns [N, vocab]."""
        ...
