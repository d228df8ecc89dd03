"""The native packed linear: every dtype, row count and padding, against products in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashserve_kernels.activation import Activation, activate
from flashserve_kernels.cpu.elementwise import ACTIVATIONS
from flashserve_kernels.cpu.linear import PackedLinear, linear, linear_gated, pack_linear
from flashserve_kernels.cpu.program import Pool, Program
from flashserve_kernels.recording import TOKENS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# (K, N): steps of K whole, with a rest, odd, shorter than one; panels of N whole, with a rest, shorter than one.
SIZES = [(64, 64), (96, 70), (131, 98), (7, 3), (1, 33), (577, 40)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_accurate(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Within the bound of products that are exact and sums in float32, and the rounding of the result."""
    expected = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        expected += bias.double()
        magnitude += bias.double().abs()
    # |error| <= K u sum|x w| for any order of K additions (Higham, Accuracy and Stability, 3.1), u = 2^-24.
    bound = (x.shape[1] + 2) * 2.0**-24 * magnitude
    bound += torch.finfo(out.dtype).eps / 2 * (expected.abs() + bound) + torch.finfo(out.dtype).smallest_normal
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.1f} times the bound"


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per row: integers (float64) and scales (float32), as the kernels define them."""
    scale = x.float().abs().amax(1) / 127
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros(()))
    return (x.float() * inverse[:, None]).round().double(), scale


def int8_model(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The quantised product without a rounding error of its own."""
    (a, a_scale), (b, b_scale) = int8_rows(x), int8_rows(weight)
    out = (a @ b.T) * a_scale.double()[:, None] * b_scale.double()
    return out if bias is None else out + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_rows_of_any_number(pool: Pool, dtype: torch.dtype, k: int, n: int) -> None:
    weight, x = random(n, k, dtype=dtype), random(130, k, dtype=dtype, seed=1)
    packed = pack_linear(pool, weight)
    for rows in [*range(1, 71), 130]:
        assert_accurate(linear(pool, x[:rows], packed), x[:rows], weight)


@pytest.mark.parametrize("dtype", DTYPES)
# Row blocks; pieces of K; both; several groups of panels to a chunk, whose sums wait for the next piece; pieces of K
# where a micro-kernel has few rows.
@pytest.mark.parametrize(
    ("rows", "k", "n"), [(2000, 320, 40), (100, 2100, 70), (300, 4200, 100), (70, 1200, 2000), (70, 9700, 40)]
)
def test_large(pool: Pool, dtype: torch.dtype, rows: int, k: int, n: int) -> None:
    weight, x, bias = random(n, k, dtype=dtype), random(rows, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    assert_accurate(linear(pool, x, pack_linear(pool, weight), bias), x, weight, bias)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("k", [1000, 4000])
def test_error_of_float32_is_that_of_partial_sums(pool: Pool, k: int, rows: int) -> None:
    """K products are summed in pieces of 64, and then the pieces: one long sum had 1.4 and 2.1 times this bound.

    A sum of j products of N(0, 1) values has variance j, and rounding it an error below u times it: pieces of P add up
    to u^2 K P / 2, and the K / P sums of pieces to u^2 K^2 / 2 P. (Higham, Accuracy and Stability, 4.2.)
    """
    weight, x = random(200, k, dtype=torch.float32), random(rows, k, dtype=torch.float32, seed=1)
    error = linear(pool, x, pack_linear(pool, weight)).double() - x.double() @ weight.double().T
    piece = 64
    assert error.square().mean().sqrt() <= 2.0**-24 * (k * piece / 2 + k**2 / (2 * piece)) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_bias_and_float32_result(pool: Pool, dtype: torch.dtype, k: int, n: int) -> None:
    weight, x, bias = random(n, k, dtype=dtype), random(37, k, dtype=dtype, seed=1), random(n, dtype=dtype, seed=2)
    out = linear(pool, x, pack_linear(pool, weight), bias, out_dtype=torch.float32)
    assert out.dtype == torch.float32
    assert_accurate(out, x, weight, bias)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "half"), [(64, 32), (131, 49), (7, 5), (577, 20), (131, 300)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(
    pool: Pool, dtype: torch.dtype, k: int, half: int, with_bias: bool, quantize: bool, activation: Activation
) -> None:
    weight = random(2 * half, k, dtype=dtype)
    bias = random(2 * half, dtype=dtype, seed=2) if with_bias else None
    packed = pack_linear(pool, weight, gated=True, quantize=quantize)
    for rows in (1, 16, 33, 130):
        x = random(rows, k, dtype=dtype, seed=rows)
        out = linear_gated(pool, x, packed, activation, bias)
        if quantize:
            gate_up = int8_model(x, weight, bias)
        else:
            gate_up = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        gate, up = gate_up[:, :half], gate_up[:, half:]
        assert out.shape == (rows, half) and out.dtype == dtype
        torch.testing.assert_close(
            out.double(),
            activate(gate, activation) * up,
            rtol=torch.finfo(dtype).eps,
            atol=1e-6 * k * gate_up.abs().max().item(),
        )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_of_large_numbers(pool: Pool, activation: Activation) -> None:
    gates = torch.tensor([-200.0, -88.5, -30.0, 0.0, 30.0, 88.5, 1e30])
    packed = pack_linear(pool, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), gated=True)
    out = linear_gated(pool, torch.stack([gates, torch.ones(7)], 1), packed, activation)
    torch.testing.assert_close(out[:, 0], activate(gates, activation), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SIZES)
def test_int8_is_the_integer_model(pool: Pool, dtype: torch.dtype, k: int, n: int) -> None:
    weight, bias = random(n, k, dtype=dtype), random(n, dtype=dtype, seed=2)
    packed = pack_linear(pool, weight, quantize=True)
    for rows in [*range(1, 40), 70, 130]:
        x = random(rows, k, dtype=dtype, seed=rows)
        out = linear(pool, x, packed, bias, out_dtype=torch.float32)
        # The integers are exact; three float32 roundings follow. A tie of the quantisation may fall to either side.
        torch.testing.assert_close(out.double(), int8_model(x, weight, bias), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("rows", "k"), [(20, 8448), (70, 9700)])  # the second in pieces of K on every processor
def test_int8_of_large_sums(pool: Pool, rows: int, k: int) -> None:
    x, weight = torch.ones(rows, k), torch.ones(40, k)
    out = linear(pool, x, pack_linear(pool, weight, quantize=True))
    torch.testing.assert_close(out, torch.full((rows, 40), float(k)), rtol=1e-6, atol=0)


def test_int8_of_zeros(pool: Pool) -> None:
    x, weight = random(3, 40, dtype=torch.float32), random(40, 40, dtype=torch.float32)
    x[1] = 0
    weight[5] = 0
    out = linear(pool, x, pack_linear(pool, weight, quantize=True))
    assert (out[1] == 0).all() and (out[:, 5] == 0).all() and out.isfinite().all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_reach_the_results_of_their_row(pool: Pool, dtype: torch.dtype, quantize: bool) -> None:
    weight, x = random(40, 50, dtype=dtype), random(20, 50, dtype=dtype, seed=1)
    x[3, 49] = float("nan")
    x[7, 0] = float("inf")
    out = linear(pool, x, pack_linear(pool, weight, quantize=quantize))
    assert not out[[3, 7]].isfinite().any()
    others = [row for row in range(20) if row not in (3, 7)]
    assert out[others].isfinite().all()


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_surrounded_by_nan(pool: Pool, dtype: torch.dtype, quantize: bool) -> None:
    """Nothing beside the rows is read: a part of qkv as input, a part of a table as weight."""
    k, n = 45, 50
    wide_x, wide_weight = torch.full((35, 200), float("nan")).to(dtype), torch.full((n, 90), float("nan")).to(dtype)
    x, weight = wide_x[1:34, 13 : 13 + k], wide_weight[:, 3 : 3 + k]
    x.copy_(random(33, k, dtype=dtype))
    weight.copy_(random(n, k, dtype=dtype, seed=1))
    out = linear(pool, x, pack_linear(pool, weight, quantize=quantize))
    if quantize:
        torch.testing.assert_close(out.double(), int8_model(x, weight), rtol=torch.finfo(dtype).eps, atol=1e-5)
    else:
        assert_accurate(out, x, weight)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_recorded_program_at_smaller_sizes(pool: Pool, gated: bool, quantize: bool) -> None:
    """Rows beyond the run's size keep what they had."""
    capacity, k, n = 80, 70, 100
    x = random(capacity, k, dtype=torch.bfloat16)
    packed = pack_linear(pool, random(n, k, dtype=torch.bfloat16, seed=1), gated=gated, quantize=quantize)

    def forward(x: Tensor, packed: PackedLinear) -> Tensor:
        return linear_gated(pool, x, packed, "gelu_tanh") if gated else linear(pool, x, packed)

    recorded = Program(pool, (capacity, 1, 1))
    recorded.add_input(x, TOKENS)
    with recorded.recording():
        out = forward(x, packed)
    for rows in (80, 1, 33, 0, 64):
        x.copy_(random(capacity, k, dtype=torch.bfloat16, seed=rows))
        out.fill_(float("nan"))
        recorded.run(rows, 1, 1)
        assert torch.equal(out[:rows], forward(x[:rows], packed))
        assert out[rows:].isnan().all()


def test_results_do_not_depend_on_other_rows(pool: Pool) -> None:
    """A request's numbers are the same alone and in a batch: greedy decoding must not change with the company."""
    x, weight = random(100, 200, dtype=torch.bfloat16), random(70, 200, dtype=torch.bfloat16, seed=1)
    packed = pack_linear(pool, weight)
    together = linear(pool, x, packed, out_dtype=torch.float32)
    alone = torch.cat([linear(pool, x[row : row + 1], packed, out_dtype=torch.float32) for row in range(100)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_after_another_librarys_products(pool: Pool) -> None:
    """oneDNN leaves the thread's AMX tiles in another shape, or released: a dead process if ours were not set anew."""
    x, weight = random(100, 256, dtype=torch.bfloat16), random(256, 256, dtype=torch.bfloat16, seed=1)
    packed = pack_linear(pool, weight)
    for rows in (1, 1, 32, 32, 100):
        F.linear(x, weight)
        assert_accurate(linear(pool, x[:rows], packed), x[:rows], weight)


def test_no_rows(pool: Pool) -> None:
    packed = pack_linear(pool, random(40, 50, dtype=torch.float32))
    assert linear(pool, torch.empty(0, 50), packed).shape == (0, 40)


def test_wrong_arguments(pool: Pool) -> None:
    weight = random(40, 50, dtype=torch.float32)
    packed, gated = pack_linear(pool, weight), pack_linear(pool, weight, gated=True)
    x = torch.zeros(3, 50)
    with pytest.raises(ValueError, match="linear_gated"):
        linear(pool, x, gated)
    with pytest.raises(ValueError, match="packed as gated"):
        linear_gated(pool, x, packed, "silu")
    with pytest.raises(ValueError, match="x must be"):
        linear(pool, torch.zeros(3, 51), packed)
    with pytest.raises(ValueError, match="x must be"):
        linear(pool, x.bfloat16(), packed)
    with pytest.raises(ValueError, match="contiguous rows"):
        linear(pool, torch.zeros(50, 3).T, packed)
    with pytest.raises(ValueError, match="bias"):
        linear(pool, x, packed, torch.zeros(41))
    with pytest.raises(ValueError, match="result"):
        linear(pool, x, packed, out_dtype=torch.float16)
    with pytest.raises(ValueError, match="cannot be packed"):
        pack_linear(pool, weight.double())
    with pytest.raises(ValueError, match="odd"):
        pack_linear(pool, weight[:39], gated=True)
    with pytest.raises(ValueError, match="overflow"):
        pack_linear(pool, torch.zeros(1, 70_000), quantize=True)
