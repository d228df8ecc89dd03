"""Weights in groups: joining formats, and full weights quantised into them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashserve_kernels.grouped import (
    INT4,
    INT8,
    GroupedFormat,
    is_exact,
    join_formats,
    quantize,
)
from grouped_weights import random_grouped


@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
@pytest.mark.parametrize("inputs", [64, 131, 3])
def test_error_is_half_a_step_of_the_range_at_most_and_smaller_on_average(format, inputs):
    weight = torch.randn(50, inputs, generator=torch.Generator().manual_seed(0))
    quantized = quantize(weight, format)
    assert torch.equal(quantized.scales.half().float(), quantized.scales)
    assert torch.equal(quantized.minimums.half().float(), quantized.minimums)
    squared, plain = torch.zeros(()), torch.zeros(())
    for first in range(0, inputs, format.group):
        group = slice(first, first + format.group)
        values, found = weight[:, group], quantized.dequantize()[:, group]
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        step = (high - low) / (2**format.bits - 1)
        rounded = ((values - low) / step.clamp_min(1e-30)).round() * step + low
        squared += (found - values).square().sum()
        plain += (rounded - values).square().sum()
    assert squared <= plain * (1 if format is INT8 or inputs < 32 else 0.95) + 1e-5


def test_values_of_a_grid_are_kept():
    """Weights that are codes times a scale plus a minimum come out as they went in."""
    weight = random_grouped(INT4, 40, 96)
    weight.codes[:, ::32], weight.codes[:, 1::32] = 0, 15
    weight = replace(weight, scales=torch.full((40, 3), 0.25), minimums=torch.arange(120.0).view(40, 3) / 8)
    assert torch.equal(quantize(weight.dequantize()).dequantize(), weight.dequantize())


def test_equal_weights_and_zeros():
    weight = torch.full((3, 64), 0.5)
    weight[1] = 0
    assert torch.equal(quantize(weight).dequantize(), weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_beyond_float16_are_refused(bad):
    weight = torch.zeros(3, 64)
    weight[1, 40] = bad
    with pytest.raises(ValueError, match="cannot be quantised"):
        quantize(weight)


@pytest.mark.parametrize(
    ("formats", "joined"),
    [
        ([(4, 32, "float16", 8), (4, 32, "float16", 8)], (4, 32, "float16", 8)),
        ([(4, 32, "float16", None), (4, 32, "float16", None)], (4, 32, "float16", None)),
        ([(4, 32, "float16", None), (4, 32, "float16", 8)], (4, 32, "float24", None)),
        ([(8, 32, "float16", 128), (4, 32, "float16", 8)], (8, 32, "float24", None)),
        ([(4, 32, "float24", None), (8, 16, "float32", 32)], (8, 16, "float32", None)),
    ],
)
def test_joined_formats(formats, joined):
    assert join_formats([GroupedFormat(*one) for one in formats]) == GroupedFormat(*joined)


@pytest.mark.parametrize("wider", [GroupedFormat(4, 16, "float24", None), GroupedFormat(8, 16, "float32", None)])
def test_wider_formats_hold_the_same_values(wider):
    weight = random_grouped(INT4, 10, 70)
    assert torch.equal(weight.to(wider).dequantize(), weight.dequantize())
    assert weight.to(wider).scales.shape == (10, 5)


def test_float24_is_exact_from_its_smallest_to_its_largest_number():
    numbers = torch.tensor([0.0, 2.0**-26, -(2.0**37) * (1 - 2.0**-18), 1 + 2.0**-17])
    assert is_exact(numbers, "float24")
    for beyond in (2.0**-27, 2.0**37, 1 + 2.0**-18, float("nan"), float("inf")):
        assert not is_exact(torch.tensor([1.0, beyond]), "float24")


def test_bits_per_weight():
    assert INT4.bits_per_weight == 5
    assert GroupedFormat(4, 32, "float24", None).bits_per_weight == 5.5
    assert GroupedFormat(8, 16, "float32", 32).bits_per_weight == 10
