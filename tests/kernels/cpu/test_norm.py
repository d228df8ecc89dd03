"""Norms in C++ on every instruction set: against float64, strided, in place, with a float32 residual stream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashserve_kernels.cpu.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from flashserve_kernels.cpu.program import Program
from flashserve_kernels.recording import TOKENS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
EPS = 1e-5


def rms(x, weight):
    return F.rms_norm(x.double(), weight.shape, weight.double(), EPS)


def layer(x, weight, bias):
    return F.layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPS)


def close(result, expected):
    tolerance = TOLERANCE[result.dtype]
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def parameters(columns, dtype):
    return (1 + torch.randn(columns) / 4).to(dtype), torch.randn(columns).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("float_weight", [False, True])
@pytest.mark.parametrize("columns", [16, 75, 576, 2048])
@pytest.mark.parametrize("rows", [1, 130])
def test_alone(pool, dtype, float_weight, columns, rows):
    weight, bias = parameters(columns, torch.float32 if float_weight else dtype)
    x = (torch.randn(rows, columns + 5) * 3 + 10).to(dtype)[:, :columns]  # a mean that a naive variance loses
    close(rms_norm(pool, x, weight, EPS), rms(x, weight))
    close(layer_norm(pool, x, weight, bias, EPS), layer(x, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_a_fused_projection_in_place(pool, dtype):
    qkv, (weight, _) = torch.randn(33, 9, 48).to(dtype), parameters(48, dtype)
    before, q = qkv.clone(), qkv[:, 2:6]
    assert rms_norm(pool, q, weight, EPS, out=q) is q
    close(q, rms(before[:, 2:6], weight))
    assert torch.equal(qkv[:, :2], before[:, :2])
    assert torch.equal(qkv[:, 6:], before[:, 6:])
    close(rms_norm(pool, before[:, 2:6], weight, EPS), rms(before[:, 2:6], weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual_dtype", [torch.float32, None])
@pytest.mark.parametrize("columns", [75, 576])
def test_after_the_residual_add(pool, dtype, residual_dtype, columns):
    x, residual = torch.randn(20, columns).to(dtype), torch.randn(20, columns).to(residual_dtype or dtype)
    weight, bias = parameters(columns, dtype)
    total = x.double() + residual.double()
    for norm, expected in (
        (lambda r: add_rms_norm(pool, x, r, weight, EPS), rms(total, weight)),
        (lambda r: add_layer_norm(pool, x, r, weight, bias, EPS), layer(total, weight, bias)),
    ):
        own = residual.clone()
        normed, summed = norm(own)
        assert normed.dtype == dtype
        assert summed.dtype == torch.float32
        assert (summed is own) == (own.dtype == torch.float32)
        close(normed, expected)
        torch.testing.assert_close(summed.double(), total, rtol=1e-6, atol=1e-6)


def test_a_recorded_program_serves_every_number_of_tokens(pool):
    x, residual = torch.randn(50, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    weight, _ = parameters(64, torch.bfloat16)
    program = Program(pool, (50, 1, 1))
    program.add_input(x, TOKENS)
    program.add_input(residual, TOKENS)
    with program.recording():
        first, total = add_rms_norm(pool, x, residual, weight, EPS)
        second, total = add_rms_norm(pool, first, total, weight, EPS)
    for tokens in (50, 1, 31):
        second.fill_(torch.nan)
        program.run(tokens, 0, 0)
        normed, expected_total = add_rms_norm(pool, x[:tokens], residual[:tokens], weight, EPS)
        expected, expected_total = add_rms_norm(pool, normed, expected_total, weight, EPS)
        assert torch.equal(second[:tokens], expected)
        assert torch.equal(total[:tokens], expected_total)
        assert second[tokens:].isnan().all()


def test_wrong_arguments_are_refused(pool):
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="weight and bias"):
        rms_norm(pool, x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match="adjacent"):
        rms_norm(pool, torch.zeros(8, 2).t(), weight, EPS)
    with pytest.raises(ValueError, match="residual must be"):
        add_rms_norm(pool, x, torch.zeros(2, 8).half(), weight, EPS)
