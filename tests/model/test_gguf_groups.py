"""GGUF's block types as weights in groups: the same float32 numbers as where they are dequantised (by transformers)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flashserve.errors import ConfigError
from flashserve.models.gguf.dequantize import dequantize
from flashserve.models.gguf.groups import GROUPED_TYPES, GgufRows
from flashserve_kernels.grouped import is_exact

TYPES = {type.block.name: type for type in GROUPED_TYPES.values()}
NUMBERS = {type.block.name: number for number, type in GROUPED_TYPES.items()}
HALVES = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
"""Where a block's float16 numbers lie; of the others at 0 alone."""


def random_blocks(name: str, rows: int, blocks: int) -> Tensor:
    """Any bytes, with finite scales of both signs."""
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (rows, blocks, TYPES[name].block.num_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scales = (generator.standard_normal((rows, blocks, 1)) / 50).astype(np.float16)
        scales[0, 0], scales[1, 0], scales[2, 0] = 0, 6e-8, -240  # the smallest of all; one whose products stay finite
        data[..., at : at + 2] = scales.view(np.uint8)
    return torch.from_numpy(data.reshape(rows, -1))


@pytest.mark.parametrize("name", TYPES)
def test_equals_the_dequantised_blocks(name: str) -> None:
    data = random_blocks(name, 20, 6)
    weight = GgufRows(TYPES[name], "it", data)
    expected = dequantize(data, NUMBERS[name])
    assert weight.shape == expected.shape
    assert torch.equal(weight.rows(0, 20).dequantize(), expected)
    assert torch.equal(weight.rows(3, 9).dequantize(), expected[3:9])


def test_rows_in_another_order_and_what_was_read() -> None:
    data, order, read = random_blocks("Q4_1", 6, 2), torch.tensor([0, 3, 1, 4, 2, 5]), []
    weight = GgufRows(TYPES["Q4_1"], "it", data, order, lambda first, last: read.append((first, last)))
    assert torch.equal(weight.rows(1, 4).dequantize(), dequantize(data, NUMBERS["Q4_1"])[[3, 1, 4]])
    assert read == [(1, 4)]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_scales_that_are_no_numbers_are_refused(bad: float) -> None:
    data = random_blocks("Q4_K", 6, 2)
    data[4, 144:146] = torch.tensor([bad], dtype=torch.float16).view(torch.uint8)
    weight = GgufRows(TYPES["Q4_K"], "x.gguf: tensor blk.0", data)
    weight.rows(0, 4)
    with pytest.raises(ConfigError, match=r"x\.gguf: tensor blk\.0 holds scales that are no numbers"):
        weight.rows(4, 6)


@pytest.mark.parametrize("name", TYPES)
def test_scales_are_exact_as_the_format_keeps_them(name: str) -> None:
    """What packing checks again, of the widest scales that the type can hold."""
    rows = GgufRows(TYPES[name], "it", random_blocks(name, 64, 8)).rows(0, 64)
    format = rows.format
    assert int(rows.codes.max()) < 2**format.bits
    kept = [rows.scales] + ([rows.minimums] if format.zero is None else [])
    assert all(is_exact(numbers, format.scales) for numbers in kept)
    if format.zero is not None:
        assert torch.equal(rows.minimums, rows.scales * -format.zero)
