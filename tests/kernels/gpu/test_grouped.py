"""Products with weights in groups and lookups in them, against the same weights dequantised."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.gpu import grouped
from flashserve_kernels.gpu.device import H200, stand_in
from flashserve_kernels.gpu.ops import TritonOps
from flashserve_kernels.grouped import INT4, Grouped, GroupedFormat, JoinedRows, QuantizedRows
from grouped_weights import random_grouped
from kernel_comparison import DTYPES, random

FORMATS = [
    GroupedFormat(4, 32, "float16", None),
    GroupedFormat(4, 32, "float24", None),
    GroupedFormat(4, 16, "float24", 4),
    GroupedFormat(8, 32, "float16", 128),
    GroupedFormat(8, 16, "float24", 32),
    GroupedFormat(8, 16, "float32", None),
]
# (K, N): whole steps and panels, with a rest, an odd number of groups, shorter than one.
SIZES = [(64, 64), (131, 98), (7, 3), (96, 33)]


def check(out: torch.Tensor, x: torch.Tensor, weight: Grouped, bias: torch.Tensor | None = None) -> None:
    """Within what sums in float32 may be off, one weight may be that is rounded the other way, and the result."""
    full = weight.dequantize().to(x.dtype).double()
    exact = x.double() @ full.T + (0 if bias is None else bias.double())
    terms = (x.double()[:, None] * full).abs()
    eps = torch.finfo(x.dtype).eps
    bound = (x.shape[1] + 3) * 2.0**-24 * (terms.sum(-1) + exact.abs()) + eps * terms.amax(-1) + eps / 2 * exact.abs()
    error = (out.cpu().double() - exact).abs()
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert (error <= bound).all(), f"{(error / bound).max():.1f} times the bound"


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_rows_of_any_number(format, k, n, device):
    weight, x = random_grouped(format, n, k), random(17, k)
    packed = grouped.pack(weight, device)
    for rows in (1, 3, 17):
        check(grouped.linear(x[:rows].to(device), packed), x[:rows], weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 65, 130])
def test_dtypes_and_bias(dtype, rows, device):
    weight = random_grouped(FORMATS[1], 70, 100)
    x, bias = random(rows, 100, dtype=dtype), random(70, dtype=dtype, seed=2)
    check(grouped.linear(x.to(device), grouped.pack(weight, device), bias.to(device)), x, weight, bias)


@pytest.mark.parametrize("with_bias", [False, True])
def test_inputs_that_are_split_among_programs(with_bias, device):
    weight, x = random_grouped(INT4, 40, 1344), random(5, 1344)
    bias = random(40, seed=2) if with_bias else None
    packed = grouped.pack(weight, device)
    assert grouped._num_splits(2, packed[0].codes.shape[1], H200) > 1
    with stand_in(H200):
        out = grouped.linear(x.to(device), packed, None if bias is None else bias.to(device))
    check(out, x, weight, bias)


def test_strided_rows_surrounded_by_nan(device):
    wide, weight = torch.full((7, 200), float("nan")), random_grouped(INT4, 50, 45)
    x = wide[1:6, 13:58]
    x.copy_(random(5, 45))
    check(grouped.linear(wide.to(device)[1:6, 13:58], grouped.pack(weight, device)), x, weight)


def test_no_rows(device):
    packed = grouped.pack(random_grouped(INT4, 50, 45), device)
    assert grouped.linear(torch.zeros(0, 45, device=device), packed).shape == (0, 50)
    assert grouped.embedding(packed, torch.zeros(0, dtype=torch.int64, device=device), torch.float32).shape == (0, 45)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_gives_the_values(format, dtype, device):
    """What is packed is what was given, to the last bit: the lookup reads it back."""
    weight, ids = random_grouped(format, 70, 300, unused_bits=9), torch.tensor([0, 69, 31, 32, 5, 5, 64])
    expected, packed = weight.dequantize()[ids], grouped.pack(weight, device)
    assert torch.equal(grouped.embedding(packed, ids.to(device), dtype).cpu(), expected.to(dtype))
    assert torch.equal(grouped.embedding(packed, ids.to(device), dtype, 3.0).cpu(), (expected * 3).to(dtype))


def test_the_numbers_of_a_float24(device):
    """From the smallest to the largest, of both signs."""
    numbers = torch.tensor([0.0, 2.0**-26, -(2.0**-26), 2.0**37 * (1 - 2.0**-18), -(2.0**37) * (1 - 2.0**-18), -1.5])
    codes, zeros = torch.ones(6, 32, dtype=torch.uint8), torch.zeros(6, 1)
    weight = Grouped(FORMATS[1], codes, numbers[:, None], zeros)
    found = grouped.embedding(grouped.pack(weight, device), torch.arange(6, device=device), torch.float32).cpu()
    assert torch.equal(found[:, 0], numbers)


def test_memory_is_what_the_format_says(device):
    for format in FORMATS:
        (packed,) = grouped.pack(random_grouped(format, 64, 96 + 32), device)
        assert packed.num_bytes == 64 * 128 * format.bits_per_weight / 8


def test_packed_in_pieces(device, monkeypatch):
    weight, x = random_grouped(FORMATS[1], 200, 96), random(3, 96)
    monkeypatch.setattr(grouped, "_PIECE_CODES", 2 * 32 * 96)
    check(grouped.linear(x.to(device), grouped.pack(weight, device)), x, weight)


def test_parts_of_unlike_formats_stay_as_narrow_as_they_are(device):
    """Queries and keys in Q4_K, values in Q6_K, as half of the layers of Q4_K_M."""
    parts = [random_grouped(format, n, 70, n) for format, n in ((FORMATS[1], 40), (FORMATS[1], 33), (FORMATS[4], 41))]
    packed = grouped.pack(JoinedRows(tuple(parts)), device)
    assert [(part.n, part.format) for part in packed] == [(73, FORMATS[1]), (41, FORMATS[4])]
    x, bias = random(9, 70), random(114, seed=2)
    out = grouped.linear(x.to(device), packed, bias.to(device))
    for part, first in zip(parts, (0, 40, 73), strict=True):
        check(out[:, first : first + part.shape[0]], x, part, bias[first : first + part.shape[0]])


def test_ops_take_weights_in_groups_and_full_ones(device):
    ops, x, full = TritonOps(device), random(3, 64), random(80, 64, seed=2)
    in_groups = QuantizedRows(full.to(device), INT4)
    weight = ops.pack_linear(in_groups, gated=True)
    gate, up = (x @ in_groups.rows(0, 80).dequantize().cpu().T).chunk(2, 1)
    found = ops.linear_gated(x.to(device), weight, "silu").cpu()
    torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up, rtol=1e-4, atol=1e-4)
    check(ops.linear(x.to(device), weight), x, in_groups.rows(0, 80))
    torch.testing.assert_close(ops.linear(x.to(device), ops.pack_linear(full.to(device))).cpu(), x @ full.T)


def test_wrong_arguments(device):
    with pytest.raises(ValueError, match="64 codes of 4 bits"):
        grouped.pack(random_grouped(GroupedFormat(4, 64, "float16", None), 40, 64), device)
    with pytest.raises(ValueError, match=r"x must be \[T, 45\]"):
        grouped.linear(torch.zeros(3, 46, device=device), grouped.pack(random_grouped(INT4, 50, 45), device))
