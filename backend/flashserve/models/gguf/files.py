"""A model in GGUF files as ModelFiles."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from flashserve.errors import ConfigError
from flashserve.layers.weight_format import WeightFormat
from flashserve.model_card import read_model_card
from flashserve.models.file_weights import matches
from flashserve.models.gguf.architectures import ROPE_FACTORS, Architecture, find_architecture, read_config, rename
from flashserve.models.gguf.dequantize import PLAIN
from flashserve.models.gguf.header import GgufHeader, TensorInfo, read_headers
from flashserve.models.gguf.metadata import Metadata
from flashserve.models.gguf.tokenizer import (
    TOKENS,
    check_tokenizer,
    end_token_ids,
    tokenizer_config,
    tokenizer_file,
)
from flashserve.models.gguf.weights import GgufWeights, ModelTensor
from flashserve.models.source import find_tokenizer_file, find_tokenizers_end
from flashserve.paths import portable
from flashserve.protocol import ModelCard
from flashserve_kernels import Ops

log = logging.getLogger(__name__)

_SAMPLE_BYTES = 1024
_SAMPLING_KEYS = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
"""Of ``general.sampling.``, and generation_config.json's names of them."""
_LEAST_TOP_P = 1e-6
"""What a top_p of 0 is in llama.cpp: one token is always left. Requests' own must be above 0."""


class GgufFiles:
    """Implements ModelFiles for a .gguf file, or for all files of a split one."""

    def __init__(self, file: Path, find_tokenizer_folder: Callable[[], Path] | None = None) -> None:
        """find_tokenizer_folder: where a tokenizer is that takes the place of the file's own. Raises ConfigError for a
        damaged file, and for an architecture or a tokenizer that is not known; weights are not read."""
        self.folder = file
        self._find_tokenizer_folder = find_tokenizer_folder
        self._headers = read_headers(file)
        self._metadata = Metadata(self._headers[0])
        _, architecture = find_architecture(self._metadata)
        if find_tokenizer_folder is None:
            check_tokenizer(self._metadata)
        stored = self._stored()
        self.config: dict[str, Any] = read_config(self._metadata, {name: info for name, (info, _) in stored.items()})
        self._tensors = {
            ours: tensor
            for name, (info, header) in stored.items()
            if name != ROPE_FACTORS
            for ours, tensor in [_model_tensor(info, header, architecture, self.config)]
        }
        if ROPE_FACTORS in stored:
            if self.config.get("rope_parameters", {}).get("rope_type") != "factors":
                raise ConfigError(f"{file.name}: the tensor {ROPE_FACTORS} is not supported in such a model")
            self.config["rope_parameters"]["factors"] = _rope_factors(*stored[ROPE_FACTORS], self.config["head_dim"])

    def _stored(self) -> dict[str, tuple[TensorInfo, GgufHeader]]:
        """All tensors under their own names, each with its file's header."""
        stored: dict[str, tuple[TensorInfo, GgufHeader]] = {}
        for header in self._headers:
            for name, info in header.tensors.items():
                if name in stored:
                    raise ConfigError(f"{header.file.name}: tensor {name} is also in {stored[name][0].file.name}")
                stored[name] = (info, header)
        return stored

    @cached_property
    def dtype(self) -> str:
        """That of plain numbers; for blocks bfloat16, which keeps more than their scales' eleven bits of range."""
        totals: dict[int, int] = {}
        for tensor in self._tensors.values():
            totals[tensor.info.type_number] = totals.get(tensor.info.type_number, 0) + tensor.info.num_elements
        largest = max(totals, key=lambda number: totals[number])
        return str(PLAIN.get(largest, torch.bfloat16)).removeprefix("torch.")

    @cached_property
    def _tokens(self) -> list[str]:
        return self._metadata.strings(TOKENS)

    @cached_property
    def card(self) -> ModelCard:
        if self._find_tokenizer_folder is not None:
            folder = self._find_tokenizer_folder()
            return read_model_card(folder, find_tokenizer_file(folder))
        prefix = "general.sampling."
        known = {ours: prefix + key for key, ours in _SAMPLING_KEYS.items() if prefix + key in self._metadata}
        generation_config = {ours: self._metadata.number(key, may_be_zero=True) for ours, key in known.items()}
        if generation_config.get("top_p") == 0:
            generation_config["top_p"] = _LEAST_TOP_P
        return ModelCard(
            tokenizer_file=portable(tokenizer_file(self._metadata)),
            tokenizer_config=tokenizer_config(self._metadata, self._tokens),
            generation_config=generation_config,
        )

    def end_token_ids(self, vocab_size: int) -> tuple[int, ...]:
        if self._find_tokenizer_folder is not None:
            of_tokenizer = find_tokenizers_end(self.card)
            ids = [] if of_tokenizer is None else [of_tokenizer]
        else:
            ids = end_token_ids(self._metadata, self._tokens)
        beyond = [one for one in ids if one >= vocab_size]
        if beyond:  # the sampler would write beyond the logits to rule them out
            log.warning("end token %s is not in the vocabulary of %d and left out", beyond, vocab_size)
        return tuple(dict.fromkeys(one for one in ids if one < vocab_size))

    def has(self, name: str) -> bool:
        return name in self._tensors

    def same(self, one: str, other: str) -> bool:
        """As far as bytes tell: numbers in other blocks differ."""
        first, second = self._tensors[one], self._tensors[other]
        if (first.info.type, first.shape) != (second.info.type, second.shape):
            return False
        rows = first.info.num_rows
        return torch.equal(first.blocks(0, rows), second.blocks(0, rows))

    def read_number(self, name: str) -> float | None:
        """No architecture has one in a GGUF file."""
        if name in self._tensors:
            raise ConfigError(f"tensor {name} must be one number")
        return None

    def num_elements(self, ignored: Iterable[str]) -> int:
        return sum(one.info.num_elements for name, one in self._tensors.items() if not matches(name, ignored))

    def weights(self, dtype: torch.dtype, device: torch.device, ops: Ops, format: WeightFormat) -> GgufWeights:
        return GgufWeights(self._tensors, dtype, device, ops, format)

    def fingerprint(self, dtype: str, layout: str) -> str:
        """It covers the headers, which hold every name and shape, the dtype, the layout, and of each tensor only a
        sample (reading the weights would take seconds): two tunings of one model differ nearly everywhere."""
        digest = hashlib.sha256(f"{dtype}\0{layout}\0".encode())
        for header in self._headers:
            digest.update(header.memory[: header.num_bytes])
            for info in header.tensors.values():
                begin = info.begin + max(0, info.num_bytes - _SAMPLE_BYTES) // 2
                digest.update(header.memory[begin : begin + min(info.num_bytes, _SAMPLE_BYTES)])
        return digest.hexdigest()


def _model_tensor(
    info: TensorInfo, header: GgufHeader, architecture: Architecture, config: dict[str, Any]
) -> tuple[str, ModelTensor]:
    """A tensor under our name, with what is to be undone."""
    name, key = rename(info.name, architecture)
    is_norm = key.endswith("norm")
    return name, ModelTensor(
        info,
        header.memory,
        head_rows=config["head_dim"] if key in architecture.in_pairs else None,
        transposed=key in architecture.transposed and len(info.shape) == 2,
        plus_one=architecture.norms_plus_one and is_norm,
    )


def _rope_factors(info: TensorInfo, header: GgufHeader, head_dim: int) -> list[float]:
    if info.type_number != 0 or info.shape != (head_dim // 2,):
        raise ConfigError(
            f"{info.file.name}: tensor {info.name} must be {head_dim // 2} numbers of F32, "
            f"not {list(info.shape)} of {info.type.name}"
        )
    return [float(one) for one in ModelTensor(info, header.memory).read(0, 1)[0]]
