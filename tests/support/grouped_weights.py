"""Random weights in groups, and the error that a product with one may have."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashserve_kernels.grouped import Grouped, GroupedFormat, linear, quantize_activations


def random_grouped(format: GroupedFormat, outputs: int, inputs: int, seed: int = 0, unused_bits: int = 0) -> Grouped:
    """Codes over their whole range; scales and minimums of both signs that the format holds exactly. unused_bits: zeros
    at the end of their 24 bits, where their products with codes must be exact."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // format.group)
    codes = torch.randint(0, 2**format.bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales, minimums = (torch.randn(outputs, groups, generator=generator) / 2**format.bits for _ in range(2))
    scales, minimums = (_exact(numbers, format.scales) for numbers in (scales, minimums * 2 ** (format.bits - 1)))
    scales, minimums = (
        (numbers.view(torch.int32) & -(1 << unused_bits)).view(torch.float32) for numbers in (scales, minimums)
    )
    return Grouped(format, codes, scales, minimums if format.zero is None else scales * -format.zero)


def _exact(numbers: Tensor, scales: str) -> Tensor:
    if scales == "float16":
        return numbers.half().float()
    return (numbers.view(torch.int32) & -64).view(torch.float32) if scales == "float24" else numbers


@dataclass(frozen=True)
class Product:
    """``x @ W.T + bias`` without rounding errors, and how far from it a result may be: [T, outputs] float64."""

    expected: Tensor
    bound: Tensor

    def check(self, out: Tensor) -> None:
        """out: results of the first rows."""
        expected, bound, finfo = self.expected[: len(out)], self.bound[: len(out)], torch.finfo(out.dtype)
        bound = bound + finfo.eps / 2 * (expected.abs() + bound) + finfo.smallest_normal
        error = (out.double() - expected).abs()
        assert out.shape == expected.shape
        assert (error <= bound).all(), f"{(error / bound).max():.1f} times the bound"


def product(x: Tensor, weight: Grouped, bias: Tensor | None = None) -> Product:
    """Sums are exact in a group, and in float32 over the groups.

    Of each group two terms, s_x s_w sum(q x) and s_x m_w sum(x), whose factors are rounded at most four times in all,
    and which are added to a sum one after the other: (2 G + 5) u times their magnitudes, u = 2^-24 (Higham, Accuracy
    and Stability, 3.1).
    """
    group, groups = weight.format.group, weight.scales.shape[1]
    integers, scales = quantize_activations(x, group)
    padding = (0, groups * group - x.shape[1])
    rows = torch.nn.functional.pad(integers.double(), padding).view(len(x), groups, group)
    codes = torch.nn.functional.pad(weight.codes.double(), padding).view(len(weight.codes), groups, group)
    scale, minimum = weight.scales.double(), weight.minimums.double()
    dots = rows.transpose(0, 1) @ codes.permute(1, 2, 0) * scale.T[:, None]  # [G, T, N]
    terms = dots.abs() + (rows.sum(-1).T[..., None] * minimum.T[:, None]).abs()
    expected, magnitude = linear(x, weight), (terms * scales.double().T[..., None]).sum(0)
    if bias is not None:
        expected, magnitude = expected + bias.double(), magnitude + bias.double().abs()
    return Product(expected, (2 * groups + 5) * 2.0**-24 * magnitude)
