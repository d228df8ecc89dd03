"""GGUF's block types as weights in groups: the same float32 numbers as transformers' own reading of the blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashserve.models.gguf_blocks import BLOCK_TYPES, GgufRows
from flashserve_kernels.grouped import is_exact

TYPE_NUMBERS = {
    "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20,
}  # fmt: skip
"""ggml's, of those that transformers reads."""
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


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Any bytes, with finite scales of both signs."""
    generator = np.random.default_rng(0)
    type = BLOCK_TYPES[name]
    data = generator.integers(0, 256, (rows, blocks, type.num_bytes), dtype=np.uint8)
    for at in HALVES.get(name, (0,)):
        scales = (generator.standard_normal((rows, blocks, 1)) / 50).astype(np.float16)
        scales[0, 0], scales[1, 0], scales[2, 0] = 0, 6e-8, -240  # the smallest of all; one whose products stay finite
        data[..., at : at + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", TYPE_NUMBERS)
def test_equals_transformers(name: str) -> None:
    from transformers.integrations.gguf.dequant import dequantize

    data = random_blocks(name, 20, 6)
    expected = dequantize(torch.from_numpy(data.reshape(-1)), TYPE_NUMBERS[name], torch.float32).view(20, -1)
    weight = GgufRows(BLOCK_TYPES[name], data)
    assert weight.shape == expected.shape
    assert torch.equal(weight.rows(0, 20).dequantize(), expected)
    assert torch.equal(weight.rows(3, 9).dequantize(), expected[3:9])


@pytest.mark.parametrize("name", ["Q5_0", "Q5_1"])
def test_five_bits(name: str) -> None:
    """Which transformers does not read: one code after the other, as ggml defines them."""
    data = random_blocks(name, 5, 3)
    has_minimum = name == "Q5_1"
    expected = np.zeros((5, 3, 32), np.float32)
    for row, block in np.ndindex(5, 3):
        raw = data.reshape(5, 3, -1)[row, block]
        at = 4 if has_minimum else 2
        d, m = raw[:2].view(np.float16)[0], raw[2:4].view(np.float16)[0]
        high, low = int(raw[at : at + 4].view(np.uint32)[0]), raw[at + 4 :]
        for i in range(32):
            nibble = int(low[i] & 15 if i < 16 else low[i - 16] >> 4)
            code = nibble | (high >> i & 1) << 4
            expected[row, block, i] = (
                np.float32(d) * code + np.float32(m) if has_minimum else np.float32(d) * (code - 16)
            )
    values = GgufRows(BLOCK_TYPES[name], data).rows(0, 5).dequantize()
    assert torch.equal(values, torch.from_numpy(expected.reshape(5, -1)))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_scales_are_exact_as_the_format_keeps_them(name: str) -> None:
    """What packing checks again, of the widest scales that the type can hold."""
    rows = GgufRows(BLOCK_TYPES[name], random_blocks(name, 64, 8)).rows(0, 64)
    format = rows.format
    assert int(rows.codes.max()) < 2**format.bits
    kept = [rows.scales] + ([rows.minimums] if format.zero is None else [])
    assert all(is_exact(numbers, format.scales) for numbers in kept)
    if format.zero is not None:
        assert torch.equal(rows.minimums, rows.scales * -format.zero)
