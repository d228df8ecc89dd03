"""Products of a few rows against float64 and torch's own, and who computes them."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.activation import activate_and_mul
from flashserve_kernels.gpu import few_rows
from flashserve_kernels.gpu.attention import new_arrivals
from flashserve_kernels.gpu.device import H200
from flashserve_kernels.gpu.few_rows import FewRows
from kernel_comparison import DTYPES, assert_as_exact_as_torch, random


@pytest.fixture
def arrivals(device) -> torch.Tensor:
    return new_arrivals(device)


def problem(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    weight = random(outputs, inputs, dtype=dtype, seed=1, scale=inputs**-0.5)
    return random(rows, inputs, dtype=dtype), weight, random(outputs, dtype=dtype, seed=2)


def exact_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.double() @ weight.double().t() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 48, 576), (3, 33, 100), (8, 20, 2100)])
def test_linear(dtype, rows, outputs, inputs, device, arrivals):
    """With splits and without, of sizes that are no multiples of a tile's; twice, by the same counters."""
    x, weight, bias = problem(rows, outputs, inputs, dtype)
    on_device = x.to(device), weight.to(device), bias.to(device), arrivals
    found = few_rows.linear(*on_device)
    assert_as_exact_as_torch(found, x @ weight.t() + bias, exact_linear(x, weight, bias))
    assert torch.equal(few_rows.linear(*on_device), found) and not arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("splits", [False, True])
def test_gated_unit(dtype, activation, splits, device, arrivals, monkeypatch):
    if not splits:
        monkeypatch.setattr(few_rows, "_MAX_SPLITS", 1)
    x, weight, bias = problem(2, 2 * 37, 700, dtype)
    found = few_rows.linear(x.to(device), weight.to(device), bias.to(device), arrivals, activation)
    exact = activate_and_mul(exact_linear(x, weight, bias), activation)
    assert_as_exact_as_torch(found, activate_and_mul(x @ weight.t() + bias, activation), exact)
    assert not arrivals.any()


def test_rows_of_a_wider_matrix_and_no_bias(device, arrivals):
    x, weight, _ = problem(2, 32, 64, torch.float32)
    wide = torch.cat((x, x), 1).to(device)
    found = few_rows.linear(wide[:, 64:], weight.to(device), None, arrivals)
    torch.testing.assert_close(found.cpu(), x @ weight.t())
    with pytest.raises(ValueError, match="at most 8"):
        few_rows.linear(random(9, 64).to(device), weight.to(device), None, arrivals)


@pytest.mark.parametrize("outputs", [16, 576, 2048, 4096, 151936])
@pytest.mark.parametrize("blocks", [1, 3, 16, 48])
def test_splits_cover_all_inputs_and_have_counters(outputs, blocks):
    splits, size = few_rows._splits(H200, outputs, blocks)
    assert (splits - 1) * size < blocks <= splits * size
    assert splits == 1 or -(-outputs // 16) <= new_arrivals(torch.device("meta")).numel()


@pytest.mark.parametrize("own_is_faster", [False, True])
def test_the_faster_one_is_chosen_once_per_shape(own_is_faster, device, arrivals):
    x, weight, bias = (tensor.to(device) for tensor in problem(2, 16, 32, torch.float32))
    measured: list[object] = []
    others: list[int] = []

    def seconds(call) -> float:
        measured.append(call())
        return float(len(measured) % 2 == int(not own_is_faster))  # own is measured first

    def other(rows: torch.Tensor) -> torch.Tensor:
        others.append(len(rows))
        return rows @ weight.t() + bias

    choice = FewRows(arrivals, seconds)
    for rows in (x, x, x[:1], random(9, 32).to(device)):
        found = choice.linear(rows, weight, bias, None, lambda rows=rows: other(rows))
        torch.testing.assert_close(found, rows @ weight.t() + bias)
    assert len(measured) == 4  # two of two rows, two of one; nine rows are nobody's but cuBLAS's
    assert others == ([2, 1, 9] if own_is_faster else [2, 2, 2, 1, 1, 9])


def test_without_a_device_to_measure_all_is_torchs(device, arrivals):
    x, weight, bias = problem(2, 16, 32, torch.float32)
    assert FewRows(arrivals, None).linear(x, weight, bias, None, lambda: x) is x
