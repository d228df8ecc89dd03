"""GGUF's quantised blocks as weights in groups, exactly.

A row of a tensor is blocks of 32 or 256 values; a block holds codes, split into nibbles and bits of several bytes, and
scales. The layouts are those of ggml's ``ggml-common.h`` and ``ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.models.gguf.block_types import BLOCK_TYPES, BlockType
from flashserve_kernels.grouped import Grouped, GroupedFormat

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Of blocks [rows, blocks, bytes]: codes [rows, blocks, values], scales and minimums [rows, blocks, groups] float32."""


@dataclass(frozen=True)
class GroupedType:
    """A block type that is groups."""

    block: BlockType
    format: GroupedFormat
    parts: Callable[[np.ndarray], Parts]


@dataclass(frozen=True)
class GgufRows:
    """A matrix of blocks, converted as its rows are asked for. Implements GroupedRows."""

    type: GroupedType
    name: str
    """For messages."""
    data: Tensor
    """[outputs, bytes of a row] uint8, may be a memory map."""
    order: Tensor | None = None
    """[outputs] int64: which row of the data each output is; None: in order."""
    done: Callable[[int, int], None] = lambda first, last: None
    """Called with (first, last) when these rows of the data were read."""

    @property
    def shape(self) -> tuple[int, int]:
        block = self.type.block
        return self.data.shape[0], self.data.shape[1] // block.num_bytes * block.elements

    @property
    def format(self) -> GroupedFormat:
        return self.type.format

    def rows(self, first: int, last: int) -> Grouped:
        """Raises ConfigError for scales that are no numbers."""
        rows = self.data[first:last] if self.order is None else self.data[self.order[first:last]]
        blocks = rows.numpy().reshape(len(rows), -1, self.type.block.num_bytes)
        codes, scales, minimums = (
            torch.from_numpy(np.ascontiguousarray(part)).view(len(rows), -1) for part in self.type.parts(blocks)
        )
        self.done(first, last)
        if not (scales.isfinite().all() and minimums.isfinite().all()):
            raise ConfigError(f"{self.name} holds scales that are no numbers; is the file damaged?")
        return Grouped(self.type.format, codes, scales, minimums)


def _halves(blocks: np.ndarray, at: int) -> np.ndarray:
    """A float16 of each block: [rows, blocks, 1] float32."""
    return blocks[..., at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """All lower halves, then all upper ones."""
    return np.concatenate([packed & 15, packed >> 4], -1)


def _bits(packed: np.ndarray, width: int) -> np.ndarray:
    """The ``8 / width`` parts of each byte: [..., parts, bytes], the lowest first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8(2**width - 1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """32 bits of each block as codes' fifth bit: [rows, blocks, 32]."""
    return np.unpackbits(blocks[..., at : at + 4], axis=-1, bitorder="little") << 4


def _with_zero(codes: np.ndarray, scales: np.ndarray, zero: int) -> Parts:
    return codes, scales, scales * np.float32(-zero)


def _q4_0(blocks: np.ndarray) -> Parts:
    return _with_zero(_nibbles(blocks[..., 2:]), _halves(blocks, 0), 8)


def _q4_1(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: np.ndarray) -> Parts:
    return _with_zero(_nibbles(blocks[..., 6:]) | _fifth_bits(blocks, 2), _halves(blocks, 0), 16)


def _q5_1(blocks: np.ndarray) -> Parts:
    return _nibbles(blocks[..., 8:]) | _fifth_bits(blocks, 4), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: np.ndarray) -> Parts:
    return _with_zero(blocks[..., 2:] ^ np.uint8(128), _halves(blocks, 0), 128)  # 128 + a signed byte


_IQ4_LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
_IQ4_CODES = (_IQ4_LEVELS + 128).astype(np.uint8)


def _iq4_nl(blocks: np.ndarray) -> Parts:
    return _with_zero(_IQ4_CODES[_nibbles(blocks[..., 2:])], _halves(blocks, 0), 128)


def _q2_k(blocks: np.ndarray) -> Parts:
    packed = blocks[..., 16:80].reshape(*blocks.shape[:2], 2, 32)
    codes = _bits(packed, 2).reshape(*blocks.shape[:2], 256)
    scales, minimums = blocks[..., :16] & 15, blocks[..., :16] >> 4
    return codes, _halves(blocks, 80) * scales, -(_halves(blocks, 82) * minimums)


def _q3_k(blocks: np.ndarray) -> Parts:
    packed = blocks[..., 32:96].reshape(*blocks.shape[:2], 2, 32)
    third = _bits(blocks[..., :32], 1).reshape(*blocks.shape[:2], 256)
    codes = _bits(packed, 2).reshape(*blocks.shape[:2], 256) | third << 2
    lower, upper = _nibbles(blocks[..., 96:104]), _bits(blocks[..., 104:108], 2).reshape(*blocks.shape[:2], 16)
    scales = (lower | upper << 4).astype(np.float32) - 32
    return _with_zero(codes, _halves(blocks, 108) * scales, 4)


def _scales_and_minimums(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight of 6 bits each from 12 bytes: four of both whole, whose bytes' upper 2 bits belong to the other four."""
    first, second, nibbles = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, nibbles & 15 | first >> 6 << 4], -1)
    minimums = np.concatenate([second & 63, nibbles >> 4 | second >> 6 << 4], -1)
    return scales, minimums


def _q4_k(blocks: np.ndarray) -> Parts:
    codes = _bits(blocks[..., 16:].reshape(*blocks.shape[:2], 4, 32), 4).reshape(*blocks.shape[:2], 256)
    scales, minimums = _scales_and_minimums(blocks[..., 4:16])
    return codes, _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minimums)


def _q5_k(blocks: np.ndarray) -> Parts:
    codes = _bits(blocks[..., 48:].reshape(*blocks.shape[:2], 4, 32), 4).reshape(*blocks.shape[:2], 256)
    fifth = _bits(blocks[..., 16:48], 1).reshape(*blocks.shape[:2], 256)
    scales, minimums = _scales_and_minimums(blocks[..., 4:16])
    return codes | fifth << 4, _halves(blocks, 0) * scales, -(_halves(blocks, 2) * minimums)


def _q6_k(blocks: np.ndarray) -> Parts:
    lower = _bits(blocks[..., :128].reshape(*blocks.shape[:2], 2, 64), 4).reshape(*blocks.shape[:2], 256)
    upper = _bits(blocks[..., 128:192].reshape(*blocks.shape[:2], 2, 32), 2).reshape(*blocks.shape[:2], 256)
    scales = blocks[..., 192:208].view(np.int8)
    return _with_zero(lower | upper << 4, _halves(blocks, 208) * scales, 32)


def _grouped(number: int, format: GroupedFormat, parts: Callable[[np.ndarray], Parts]) -> tuple[int, GroupedType]:
    return number, GroupedType(BLOCK_TYPES[number], format, parts)


GROUPED_TYPES = dict(
    (
        _grouped(2, GroupedFormat(4, 32, "float16", 8), _q4_0),
        _grouped(3, GroupedFormat(4, 32, "float16", None), _q4_1),
        _grouped(6, GroupedFormat(8, 32, "float16", 16), _q5_0),
        _grouped(7, GroupedFormat(8, 32, "float16", None), _q5_1),
        _grouped(8, GroupedFormat(8, 32, "float16", 128), _q8_0),
        _grouped(10, GroupedFormat(4, 16, "float24", None), _q2_k),
        _grouped(11, GroupedFormat(4, 16, "float24", 4), _q3_k),
        _grouped(12, GroupedFormat(4, 32, "float24", None), _q4_k),
        _grouped(13, GroupedFormat(8, 32, "float24", None), _q5_k),
        _grouped(14, GroupedFormat(8, 16, "float24", 32), _q6_k),
        _grouped(20, GroupedFormat(8, 32, "float16", 128), _iq4_nl),
    )
)
"""By ggml's number."""
