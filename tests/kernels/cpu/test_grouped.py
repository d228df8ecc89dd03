"""Native products with weights in groups, against the same products without rounding errors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashserve_kernels.activation import Activation, activate
from flashserve_kernels.cpu.grouped import PackedGrouped, embedding, linear, linear_gated, pack, pack_grouped
from flashserve_kernels.cpu.program import Pool, Program
from flashserve_kernels.grouped import (
    INT4,
    INT8,
    Grouped,
    GroupedFormat,
    GroupedRows,
    JoinedRows,
    QuantizedRows,
    join_formats,
    quantize_activations,
)
from flashserve_kernels.grouped import linear as exact_linear
from flashserve_kernels.recording import TOKENS
from grouped_weights import product, random_grouped

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = [
    GroupedFormat(bits, group, scales, zero)
    for bits, zeros in ((4, (None, 8)), (8, (None, 128)))
    for group in (16, 32)
    for scales, zero in (("float16", zeros[0]), ("float24", zeros[1]), ("float24", zeros[0]), ("float32", zeros[1]))
]
# (K, N): whole groups and panels, with a rest, odd, shorter than one.
SIZES = [(64, 64), (96, 70), (131, 98), (7, 3), (1, 33), (577, 40)]


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_rows_of_any_number(pool: Pool, format: GroupedFormat, k: int, n: int) -> None:
    weight, x = random_grouped(format, n, k), random(300, k)
    packed, exact = pack_grouped(pool, weight), product(x, weight)
    for rows in (*range(1, 16), 33, 300):
        exact.check(linear(pool, x[:rows], packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [INT4, INT8], ids=str)
def test_dtypes_bias_and_float32_result(pool: Pool, dtype: torch.dtype, format: GroupedFormat) -> None:
    weight, x, bias = random_grouped(format, 70, 96), random(37, 96, dtype=dtype), random(70, dtype=dtype, seed=2)
    packed, exact = pack_grouped(pool, weight), product(x, weight, bias)
    for out_dtype in (dtype, torch.float32):
        out = linear(pool, x, packed, bias, out_dtype)
        assert out.dtype == out_dtype
        exact.check(out)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_largest_sums(pool: Pool, format: GroupedFormat) -> None:
    """Sums of a group where each product is as large as it can be."""
    weight, x = random_grouped(format, 40, 256), torch.ones(7, 256)
    weight.codes.fill_(2**format.bits - 1)
    x[1] = -1
    x[2, ::2] = -1
    product(x, weight).check(linear(pool, x, pack_grouped(pool, weight)))


@pytest.mark.parametrize(
    ("activation", "with_bias"), [("silu", False), ("silu", True), ("gelu_tanh", False), ("gelu", True)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "half"), [(64, 32), (131, 49), (7, 5), (577, 20)])
@pytest.mark.parametrize("format", [INT4, FORMATS[1], INT8], ids=str)
def test_gated(
    pool: Pool, format: GroupedFormat, dtype: torch.dtype, k: int, half: int, activation: Activation, with_bias: bool
) -> None:
    weight = random_grouped(format, 2 * half, k)
    bias = random(2 * half, dtype=dtype, seed=2) if with_bias else None
    packed = pack_grouped(pool, weight, gated=True)
    for rows in (1, 16, 33):
        x = random(rows, k, dtype=dtype, seed=rows)
        gate_up = exact_linear(x, weight) + (0 if bias is None else bias.double())
        gate, up = gate_up[:, :half], gate_up[:, half:]
        out = linear_gated(pool, x, packed, activation, bias)
        assert out.shape == (rows, half) and out.dtype == dtype
        torch.testing.assert_close(
            out.double(),
            activate(gate, activation) * up,
            rtol=torch.finfo(dtype).eps,
            atol=1e-6 * k * gate_up.abs().max().item(),
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_embedding_gives_the_values(pool: Pool, format: GroupedFormat, dtype: torch.dtype) -> None:
    """What is packed is what was given, to the last bit: the lookup reads it back."""
    weight = random_grouped(format, 70, 131, unused_bits=9)
    ids = torch.tensor([0, 69, 31, 32, 5, 5, 64])
    expected = weight.dequantize()[ids]
    packed = pack_grouped(pool, weight)
    assert torch.equal(embedding(pool, packed, ids, dtype), expected.to(dtype))
    assert torch.equal(embedding(pool, packed, ids, dtype, scale=3.0), (expected * 3).to(dtype))


def test_memory_is_what_the_format_says(pool: Pool) -> None:
    for format in FORMATS:
        assert pack_grouped(pool, random_grouped(format, 64, 96)).num_bytes == 64 * 96 * format.bits_per_weight / 8


def test_packed_in_pieces(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are asked for some at a time, gates beside their ups."""
    weight, x = random_grouped(INT4, 200, 96), random(5, 96)
    whole = [
        linear_gated(pool, x, pack_grouped(pool, weight, gated=True), "silu"),
        linear(pool, x, pack_grouped(pool, weight)),
    ]
    asked = []

    class Recorded:
        shape, format = weight.shape, weight.format

        def rows(self, first: int, last: int) -> Grouped:
            asked.append((first, last))
            return weight.rows(first, last)

    source: GroupedRows = Recorded()
    monkeypatch.setattr("flashserve_kernels.cpu.grouped._PIECE_CODES", 2 * 32 * 96)
    pieces = [
        linear_gated(pool, x, pack_grouped(pool, source, gated=True), "silu"),
        linear(pool, x, pack_grouped(pool, source)),
    ]
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))
    assert asked[:4] == [(0, 32), (100, 132), (32, 64), (132, 164)]
    assert asked[-4:] == [(0, 64), (64, 128), (128, 192), (192, 200)]


def test_joined_weights_of_different_formats(pool: Pool) -> None:
    formats = [
        GroupedFormat(4, 32, "float16", 8),
        GroupedFormat(4, 16, "float24", None),
        GroupedFormat(8, 32, "float32", 128),
    ]
    parts = [random_grouped(format, 40, 70, seed) for seed, format in enumerate(formats)]
    joined, x = JoinedRows(tuple(parts)), random(9, 70)
    assert joined.format == GroupedFormat(8, 16, "float32", None) == join_formats(formats)
    out = linear(pool, x, pack_grouped(pool, joined))
    product(x, joined.rows(0, 120)).check(out)
    values = torch.cat([part.dequantize() for part in parts])
    assert torch.equal(joined.rows(0, 120).dequantize(), values)


def test_parts_of_unlike_formats_stay_as_narrow_as_they_are(pool: Pool) -> None:
    """Queries and keys in Q4_K, values in Q6_K, as half of the layers of Q4_K_M."""
    narrow, wide = GroupedFormat(4, 32, "float24", None), GroupedFormat(8, 16, "float24", 128)
    parts = [random_grouped(format, n, 70, n) for format, n in ((narrow, 40), (narrow, 33), (wide, 41))]
    packed = pack(pool, JoinedRows(tuple(parts)))
    apart = [pack_grouped(pool, part) for part in (JoinedRows(tuple(parts[:2])), parts[2])]
    assert (packed.n, packed.k, packed.num_bytes) == (114, 70, sum(part.num_bytes for part in apart))
    x, bias = random(33, 70), random(114, seed=2)
    recorded = Program(pool, (33, 1, 1))
    recorded.add_input(x, TOKENS)
    with recorded.recording():
        out = linear(pool, x, packed, bias)
    recorded.run(33, 1, 1)
    for found in (out, linear(pool, x, packed, bias)):
        for part, first in zip(parts, (0, 40, 73), strict=True):
            last = first + part.shape[0]
            product(x, part, bias[first:last]).check(found[:, first:last])


def test_parts_of_like_formats_are_one_weight(pool: Pool) -> None:
    formats = GroupedFormat(8, 32, "float16", 128), GroupedFormat(8, 32, "float16", None)
    parts = [random_grouped(format, 40, 70) for format in formats]
    assert isinstance(pack(pool, JoinedRows(tuple(parts))), PackedGrouped)


def test_full_weights_are_quantised_in_pieces(pool: Pool) -> None:
    weight, x = QuantizedRows(random(70, 131), INT4), random(9, 131, seed=2)
    product(x, weight.rows(0, 70)).check(linear(pool, x, pack_grouped(pool, weight)))


def test_zeros(pool: Pool) -> None:
    weight, x = random_grouped(INT4, 40, 64), random(3, 64)
    x[1] = 0
    x[2, 32:] = 0
    weight.scales[5] = weight.minimums[5] = 0
    out = linear(pool, x, pack_grouped(pool, weight))
    assert (out[1] == 0).all() and (out[:, 5] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_the_results_of_their_row(pool: Pool, dtype: torch.dtype) -> None:
    weight, x = random_grouped(INT8, 40, 50), random(20, 50, dtype=dtype)
    x[3, 49] = float("nan")
    x[7, 0] = float("inf")
    out = linear(pool, x, pack_grouped(pool, weight))
    assert not out[[3, 7]].isfinite().any()
    assert out[[row for row in range(20) if row not in (3, 7)]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_surrounded_by_nan(pool: Pool, dtype: torch.dtype) -> None:
    wide = torch.full((35, 200), float("nan")).to(dtype)
    x, weight = wide[1:34, 13 : 13 + 45], random_grouped(INT4, 50, 45)
    x.copy_(random(33, 45, dtype=dtype))
    product(x, weight).check(linear(pool, x, pack_grouped(pool, weight)))


@pytest.mark.parametrize("gated", [False, True])
def test_recorded_program_at_smaller_sizes(pool: Pool, gated: bool) -> None:
    """Rows beyond the run's size keep what they had."""
    capacity, n = 80, 100
    ids = torch.randint(0, n, (capacity,), generator=torch.Generator().manual_seed(0))
    table, packed = (
        pack_grouped(pool, random_grouped(INT4, n, 70, seed), gated=seed == 1 and gated) for seed in (0, 1)
    )

    def forward(ids: Tensor) -> Tensor:
        x = embedding(pool, table, ids, torch.bfloat16)
        return linear_gated(pool, x, packed, "silu") if gated else linear(pool, x, packed)

    recorded = Program(pool, (capacity, 1, 1))
    recorded.add_input(ids, TOKENS)
    with recorded.recording():
        out = forward(ids)
    for rows in (80, 1, 33, 0, 64):
        out.fill_(float("nan"))
        recorded.run(rows, 1, 1)
        assert torch.equal(out[:rows], forward(ids[:rows]))
        assert out[rows:].isnan().all()


def test_results_do_not_depend_on_other_rows(pool: Pool) -> None:
    x, packed = random(100, 200), pack_grouped(pool, random_grouped(INT4, 70, 200))
    alone = torch.cat([linear(pool, x[row : row + 1], packed, out_dtype=torch.float32) for row in range(100)])
    assert torch.equal(linear(pool, x, packed, out_dtype=torch.float32), alone)


def test_wrong_arguments(pool: Pool) -> None:
    weight, x = random_grouped(INT4, 40, 50), torch.zeros(3, 50)
    packed, gated = pack_grouped(pool, weight), pack_grouped(pool, weight, gated=True)
    with pytest.raises(ValueError, match="linear_gated"):
        linear(pool, x, gated)
    with pytest.raises(ValueError, match="packed as gated"):
        linear_gated(pool, x, packed, "silu")
    with pytest.raises(ValueError, match="x must be"):
        linear(pool, torch.zeros(3, 51), packed)
    with pytest.raises(ValueError, match="bias"):
        linear(pool, x, packed, torch.zeros(41))
    with pytest.raises(ValueError, match="result"):
        linear(pool, x, packed, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="ids must be"):
        embedding(pool, packed, torch.zeros(3), torch.float32)
    with pytest.raises(ValueError, match="gated weight cannot be looked up"):
        embedding(pool, gated, torch.zeros(3, dtype=torch.int64), torch.float32)
    with pytest.raises(ValueError, match="as gated"):
        pack_grouped(pool, weight.rows(0, 39), gated=True)
    with pytest.raises(ValueError, match="64 codes of 4 bits"):
        pack_grouped(pool, replace(weight, format=replace(INT4, group=64)))


@pytest.mark.parametrize("scales", ["float16", "float24"])
def test_what_would_not_be_exact_is_refused(pool: Pool, scales: str) -> None:
    format = GroupedFormat(4, 32, scales, None)
    weight = random_grouped(format, 40, 64)
    for numbers in (weight.scales, weight.minimums):
        kept = numbers[3, 1].clone()
        numbers[3, 1] = 1 / 3
        with pytest.raises(ValueError, match=f"not exact in {scales}"):
            pack_grouped(pool, weight)
        numbers[3, 1] = kept
    with pytest.raises(ValueError, match="not those of a zero of 8"):
        pack_grouped(pool, replace(weight, format=replace(format, zero=8)))
    weight.codes[2, 2] = 16
    with pytest.raises(ValueError, match="below 16"):
        pack_grouped(pool, weight)


def test_activations_are_quantised_to_the_nearest(pool: Pool) -> None:
    """A weight of ones at one place reads the integers back."""
    x = random(5, 64, dtype=torch.float32)
    codes, ones, zeros = torch.eye(64, dtype=torch.uint8), torch.ones(64, 2), torch.zeros(64, 2)
    out = linear(pool, x, pack_grouped(pool, Grouped(INT8, codes, ones, zeros)))
    integers, scales = quantize_activations(x, 32)
    torch.testing.assert_close(out, integers * scales.repeat_interleave(32, 1), rtol=1e-6, atol=0)
    assert ((out - x).abs() <= scales.repeat_interleave(32, 1) * 0.5001).all()
