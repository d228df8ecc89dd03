"""Blocks to numbers. All that is used of transformers' GGUF modules is in this file: they are private there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.models.gguf.block_types import BLOCK_TYPES

PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types whose blocks are numbers as they are."""


def dequantize(data: Tensor, type_number: int) -> Tensor:
    """data: [rows, bytes of a row] uint8, whole blocks of ggml's type. Returns [rows, numbers of a row], in float32
    where they were not plain numbers."""
    if type_number in PLAIN:
        return data.view(PLAIN[type_number])
    rows = data.shape[0]
    if type_number in (6, 7):
        return _five_bits(data.reshape(-1, BLOCK_TYPES[type_number].num_bytes), type_number == 7).view(rows, -1)
    values: Tensor = _transformers().dequantize(data.reshape(-1), type_number, torch.float32)
    return values.view(rows, -1)


@cache
def _transformers() -> ModuleType:
    """The file of transformers that knows the formats. It needs torch alone, and importing its package takes 1.3 s, so
    it is loaded by its path. Raises ConfigError for a transformers without it (before 5.24)."""
    package = find_spec("transformers")
    folders = package.submodule_search_locations if package is not None else None
    path = Path(folders[0]) / "integrations" / "gguf" / "dequant.py" if folders else None
    spec = spec_from_file_location("flashserve_gguf_dequant", path) if path is not None and path.is_file() else None
    if spec is None or spec.loader is None:
        raise ConfigError("this transformers cannot read GGUF files: pip install 'transformers>=5.24,<5.25'")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _five_bits(blocks: Tensor, has_minimum: bool) -> Tensor:
    """Q5_0 and Q5_1, which transformers lacks: d (and m) in float16, 32 fifth bits, then 16 bytes of two codes each,
    the low ones first. blocks: [n, bytes] uint8. Returns [n, 32] float32: d·(q - 16), or d·q + m."""
    head = 4 if has_minimum else 2
    scales = blocks[:, :head].contiguous().view(torch.float16).float()
    shifts = torch.arange(8, dtype=torch.uint8)
    fifth = (blocks[:, head : head + 4, None] >> shifts & 1).reshape(-1, 32)
    low = blocks[:, head + 4 :]
    codes = (torch.cat((low & 15, low >> 4), 1) | fifth << 4).float()
    return codes * scales[:, :1] + scales[:, 1:] if has_minimum else (codes - 16) * scales[:, :1]
