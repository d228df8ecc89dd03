"""A model's own files, opened once: what they say of the model, and its weights."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from flashserve.errors import ConfigError
from flashserve.layers.weight_format import WeightFormat
from flashserve.layers.weight_source import WeightSource
from flashserve.model_card import read_json_object, read_model_card
from flashserve.models.checkpoint import Checkpoint, CheckpointWeights
from flashserve.models.source import find_tokenizer_file, find_tokenizers_end
from flashserve.protocol import ModelCard
from flashserve_kernels import Ops

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 1024


class LoadableWeights(WeightSource, Protocol):
    """A weight source that knows what was not asked for."""

    def finish(self, ignored: Iterable[str]) -> None:
        """Nothing more will be read. Raises ConfigError if there are tensors that the model did not take, apart from
        those whose names match a pattern (fnmatch)."""
        ...


class ModelFiles(Protocol):
    """Where a model comes from. A folder of safetensors is one; whatever else gives this can be served as well."""

    folder: Path
    """For messages, and for the small files beside the weights."""
    config: dict[str, Any]
    """config.json as it is meant: without what is null, and with a head that is not tied where a stored one differs
    (``registry.open_model``)."""

    @property
    def dtype(self) -> str:
        """That most of the weights have: float32, bfloat16, float16."""
        ...

    @property
    def card(self) -> ModelCard:
        """Tokenizer, chat template, defaults."""
        ...

    def end_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        ...

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers."""
        ...

    def read_number(self, name: str) -> float | None:
        """A tensor of one number, exactly; None where there is no such tensor. Raises ConfigError for one of more."""
        ...

    def num_elements(self, ignored: Iterable[str]) -> int:
        """Numbers in all tensors whose names match none of the patterns."""
        ...

    def weights(self, dtype: torch.dtype, device: torch.device, ops: Ops, format: WeightFormat) -> LoadableWeights:
        """The weights, for a model to be built with."""
        ...

    def fingerprint(self, dtype: str, layout: str) -> str:
        """A hash that differs wherever two models' KV blocks may differ; the root of the prefix cache's hashes. Equal
        on every machine that holds the same files. layout: what else blocks depend on, in words."""
        ...


class SafetensorsFolder:
    """Implements ModelFiles for a Hugging Face folder: config.json and safetensors files."""

    def __init__(self, folder: Path, find_tokenizer_folder: Callable[[], Path] | None = None) -> None:
        """find_tokenizer_folder: where the tokenizer is, if it is elsewhere. Raises ConfigError for a config.json that
        is missing or broken; other files are opened when they are asked for."""
        self.folder = folder
        self._find_tokenizer_folder = find_tokenizer_folder or (lambda: folder)
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} is not a model folder: it has no config.json")
        self.config: dict[str, Any] = _without_nulls(read_json_object(folder / "config.json"))

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(self.folder)

    @property
    def dtype(self) -> str:
        return self._checkpoint.dtype

    @cached_property
    def card(self) -> ModelCard:
        return read_model_card(self.folder, find_tokenizer_file(self._find_tokenizer_folder()))

    def end_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        """Of generation_config.json, which instruction-tuned models extend, else of config.json; and, as in vLLM, the
        tokenizer's."""
        value, origin = self.card.generation_config.get("eos_token_id"), "generation_config.json"
        if value is None:
            value, origin = self.config.get("eos_token_id", []), "config.json"
        ids = value if isinstance(value, list) else [value]
        if not all(type(one) is int for one in ids):
            raise ConfigError(f"eos_token_id in {origin} must be an integer or a list of them, not {value!r}")
        of_tokenizer = find_tokenizers_end(self.card)
        ids = [*ids, *([] if of_tokenizer is None else [of_tokenizer])]
        beyond = [one for one in ids if not 0 <= one < vocab_size]
        if beyond:  # the sampler would write beyond the logits to rule them out
            log.warning("%s: end token %s is not in the vocabulary of %d and left out", origin, beyond, vocab_size)
        return tuple(dict.fromkeys(one for one in ids if 0 <= one < vocab_size))

    def has(self, name: str) -> bool:
        return name in self._checkpoint.entries

    def same(self, one: str, other: str) -> bool:
        return self._checkpoint.same(one, other)

    def read_number(self, name: str) -> float | None:
        return self._checkpoint.read_number(name)

    def num_elements(self, ignored: Iterable[str]) -> int:
        return self._checkpoint.num_elements(ignored)

    def weights(self, dtype: torch.dtype, device: torch.device, ops: Ops, format: WeightFormat) -> LoadableWeights:
        return CheckpointWeights(self._checkpoint, dtype, device, ops, format)

    def fingerprint(self, dtype: str, layout: str) -> str:
        """It covers config.json, the files' names and headers, the dtype, the layout, and of each tensor only a sample
        (reading the weights would take seconds): two tunings of one model differ nearly everywhere."""
        digest = hashlib.sha256(f"{dtype}\0{layout}\0".encode())
        digest.update((self.folder / "config.json").read_bytes())
        for file in self._checkpoint.files:
            digest.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
        for name, entry in sorted(self._checkpoint.entries.items()):
            digest.update(f"{name}\0{entry.dtype}\0{entry.shape}\0{entry.begin}\0".encode())
            digest.update(self._checkpoint.sample(name, _SAMPLE_BYTES))
        return digest.hexdigest()


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
