"""Weights in groups: codes of 4 or 8 bits, with a scale and a minimum for each group of 16 or 32 inputs.

``value = scale * code + minimum`` in float32. Every block type of GGUF up to Q8_0 and Q6_K is one of these exactly.
Here is what such a weight is, how full weights become one, and what a product with one means; implementations of the
ops pack it as they like.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

SCALES = ("float16", "float24", "float32")
"""How scales and minimums are kept, narrowest first. float24 has a sign, 6 bits of exponent and 17 of fraction: from
2^-26 to 2^37, which holds every product of a float16 and an integer of 7 bits, such as the scales of Q2_K to Q6_K."""


def is_exact(numbers: Tensor, scales: str) -> bool:
    """Whether float32 numbers are the same in one of ``SCALES``."""
    if scales == "float32":
        return True
    if scales == "float16":
        return torch.equal(numbers.half().float(), numbers)
    in_range = (numbers == 0) | (numbers.abs() >= 2.0**-26) & (numbers.abs() < 2.0**37)
    return bool((in_range & (numbers.contiguous().view(torch.int32) & 0x3F == 0)).all())


@dataclass(frozen=True)
class GroupedFormat:
    """What all groups of a weight have in common."""

    bits: int
    """Of a code: 4 or 8."""
    group: int
    """Inputs that share a scale: 16 or 32."""
    scales: str
    """One of ``SCALES``, in which scales and minimums are exact."""
    zero: int | None
    """The code of the value 0, where it is the same everywhere: minimums are ``-zero * scale`` then and not kept."""

    @property
    def bits_per_weight(self) -> float:
        """In memory, scales included."""
        kept = 1 if self.zero is not None else 2
        return self.bits + kept * {"float16": 16, "float24": 24, "float32": 32}[self.scales] / self.group


def join_formats(formats: Sequence[GroupedFormat]) -> GroupedFormat:
    """The narrowest format that holds weights of all of these."""
    zeros = {one.zero for one in formats}
    zero = zeros.pop() if len(zeros) == 1 else None
    scales = max((one.scales for one in formats), key=SCALES.index)
    if zero is None and scales == "float16" and any(one.zero is not None for one in formats):
        scales = "float24"  # a product of a zero and a scale may be beyond float16's range
    return GroupedFormat(max(one.bits for one in formats), min(one.group for one in formats), scales, zero)


class GroupedRows(Protocol):
    """A weight that gives its rows in groups. It may make them as they are asked for, so that loading does not need
    the memory of a second copy."""

    @property
    def shape(self) -> tuple[int, int]:
        """(outputs, inputs)"""
        ...

    @property
    def format(self) -> GroupedFormat: ...

    def rows(self, first: int, last: int) -> Grouped:
        """Outputs [first, last), in ``format``."""
        ...


@dataclass(frozen=True)
class Grouped:
    """A weight, or some of its outputs, in groups. Implements GroupedRows."""

    format: GroupedFormat
    codes: Tensor
    """[outputs, inputs] uint8, one code per byte."""
    scales: Tensor
    """[outputs, ceil(inputs / group)] float32."""
    minimums: Tensor
    """The same shape, also where the format has a zero."""

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, first: int, last: int) -> Grouped:
        return Grouped(self.format, self.codes[first:last], self.scales[first:last], self.minimums[first:last])

    def to(self, wider: GroupedFormat) -> Grouped:
        """The same values in a format that :func:`join_formats` made."""
        repeats = self.format.group // wider.group
        inputs = -(-self.shape[1] // wider.group)
        scales, minimums = (
            part.repeat_interleave(repeats, 1)[:, :inputs] if repeats > 1 else part
            for part in (self.scales, self.minimums)
        )
        return Grouped(wider, self.codes, scales, minimums)

    def dequantize(self) -> Tensor:
        """[outputs, inputs] float32."""
        inputs = self.shape[1]
        scales, minimums = (
            part.repeat_interleave(self.format.group, 1)[:, :inputs] for part in (self.scales, self.minimums)
        )
        return self.codes * scales + minimums


def concatenate(parts: Sequence[Grouped]) -> Grouped:
    """Outputs of weights of one format, one weight after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    codes, scales, minimums = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales", "minimums")
    )
    return Grouped(first.format, codes, scales, minimums)


@dataclass(frozen=True)
class JoinedRows:
    """Several weights of equal inputs, one after the other, in the format that holds all. Implements GroupedRows."""

    parts: tuple[GroupedRows, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def format(self) -> GroupedFormat:
        return join_formats([part.format for part in self.parts])

    def rows(self, first: int, last: int) -> Grouped:
        found, begin = [], 0
        for part in self.parts:
            end = begin + part.shape[0]
            if first < end and begin < last:
                found.append(part.rows(max(first, begin) - begin, min(last, end) - begin).to(self.format))
            begin = end
        return concatenate(found)


MOST_WIDENING = 1.25
"""What a joined weight may take of its parts' bytes. Q4_K_M has values in Q6_K in half of the layers; queries and keys
in Q4_K would take twice their bytes in the format that holds all three."""


def split_unlike(weight: JoinedRows) -> tuple[GroupedRows, ...]:
    """The weight whole, or, where its format is much wider than its parts', as runs of parts of one format."""
    together = weight.format.bits_per_weight * weight.shape[0]
    apart = sum(part.format.bits_per_weight * part.shape[0] for part in weight.parts)
    if together <= MOST_WIDENING * apart:
        return (weight,)
    return tuple(JoinedRows(tuple(run)) for _, run in groupby(weight.parts, key=lambda part: part.format))


# --- full weights into groups ------------------------------------------------------------------------------------

INT4 = GroupedFormat(bits=4, group=32, scales="float16", zero=None)
"""5 bits per weight."""
INT8 = GroupedFormat(bits=8, group=32, scales="float16", zero=None)
"""9 bits per weight."""
_REFINEMENTS = 4


@dataclass(frozen=True)
class QuantizedRows:
    """Full weights [outputs, inputs] of any dtype whose rows are quantised as they are asked for. Implements
    GroupedRows."""

    weight: Tensor
    format: GroupedFormat = INT4

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, first: int, last: int) -> Grouped:
        return quantize(self.weight[first:last], self.format)


def quantize(weight: Tensor, format: GroupedFormat = INT4) -> Grouped:
    """Full weights [outputs, inputs] in groups: from minimum to maximum, then refined to the least squared error.

    Scales and minimums are numbers of float16. Raises ValueError for weights that are beyond its range.
    """
    outputs, inputs = weight.shape
    groups = -(-inputs // format.group)
    padded = torch.nn.functional.pad(weight.float(), (0, groups * format.group - inputs))
    values = padded.view(outputs, groups, format.group)
    real = (torch.arange(groups * format.group, device=weight.device) < inputs).view(1, groups, format.group)
    most = 2**format.bits - 1
    low = torch.where(real, values, float("inf")).amin(-1)
    high = torch.where(real, values, float("-inf")).amax(-1)
    best = _codes(values, (high - low) / most, low, most)
    for _ in range(_REFINEMENTS):
        candidate = _codes(values, *_least_squares(best[0], values, real), most)
        better = _squared_error(candidate, values, real) < _squared_error(best, values, real)
        best = (
            torch.where(better[..., None], candidate[0], best[0]),
            torch.where(better, candidate[1], best[1]),
            torch.where(better, candidate[2], best[2]),
        )
    codes, scales, minimums = best
    if not (scales.isfinite().all() and minimums.isfinite().all()):
        raise ValueError("weights that are no numbers, or beyond float16's range, cannot be quantised in groups")
    return Grouped(format, codes.to(torch.uint8).view(outputs, -1)[:, :inputs].contiguous(), scales, minimums)


def _codes(values: Tensor, scales: Tensor, minimums: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest codes (float32) under scales and minimums that float16 can hold; and these."""
    scales, minimums = scales.half().float(), minimums.half().float()
    inverse = torch.where(scales != 0, 1 / scales, 0)
    codes = ((values - minimums[..., None]) * inverse[..., None]).round_().clamp_(0, most)
    return codes, scales, minimums


def _least_squares(codes: Tensor, values: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The line through (code, value) of each group: scale and minimum."""
    count = real.sum(-1)
    codes = torch.where(real, codes, 0)
    mean_code, mean_value = codes.sum(-1) / count, values.sum(-1) / count
    spread = torch.where(real, codes - mean_code[..., None], 0)
    variance = spread.square().sum(-1)
    scales = torch.where(variance > 0, (spread * values).sum(-1) / variance, 0)
    return scales, mean_value - scales * mean_code


def _squared_error(quantized: tuple[Tensor, ...], values: Tensor, real: Tensor) -> Tensor:
    codes, scales, minimums = quantized
    return torch.where(real, codes * scales[..., None] + minimums[..., None] - values, 0).square().sum(-1)


# --- products ------------------------------------------------------------------------------------------------------


def quantize_activations(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """x: [T, inputs]. Returns integers [T, inputs] in [-127, 127] (int32), symmetric per row and group, to the nearest,
    halves to even; and their scales [T, ceil(inputs / group)] float32."""
    tokens, inputs = x.shape
    groups = -(-inputs // group)
    values = torch.nn.functional.pad(x.float(), (0, groups * group - inputs)).view(tokens, groups, group)
    scales = values.abs().amax(-1) / 127
    inverse = torch.where(scales > 0, 1 / scales, 0)
    integers = (values * inverse[..., None]).round_().to(torch.int32)
    return integers.view(tokens, -1)[:, :inputs], scales


def linear(x: Tensor, weight: Grouped) -> Tensor:
    """``x @ W.T`` with activations quantised to int8, and no other error: what implementations are measured against.

    x: [T, inputs]. Returns [T, outputs] float64.
    """
    integers, scales = quantize_activations(x, weight.format.group)
    rounded = integers.double() * scales.double().repeat_interleave(weight.format.group, 1)[:, : x.shape[1]]
    return rounded @ weight.dequantize().double().T
