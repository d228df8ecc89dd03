"""Activations in Triton-lang against float64 and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flashserve_kernels.gpu import activation
from kernel_comparison import DTYPES, assert_as_exact_as_torch, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width", [(1, 7), (5, 1536), (3, 2048), (2, 14336)])
def test_silu_and_mul(dtype, tokens, width, device):
    gate_up = random(tokens, 2 * width, dtype=dtype, scale=3)
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    torchs = F.silu(gate_up[:, :width]) * gate_up[:, width:]
    before = gate_up.clone()
    result = activation.silu_and_mul(gate_up.to(device))
    assert_as_exact_as_torch(result, torchs, gate / (1 + (-gate).exp()) * up)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 3072), (2, 3, 700)])
def test_gelu_is_the_tanh_form(dtype, shape, device):
    x = random(*shape, dtype=dtype, scale=2)
    y = x.double()
    exact = 0.5 * y * (1 + (math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)).tanh())
    assert_as_exact_as_torch(activation.gelu_tanh(x.to(device)), F.gelu(x, approximate="tanh"), exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(dtype, device):
    x = torch.tensor([[-300.0, 300.0, -20.0, 0.0, 100.0, 200.0, 1.0, 1.0]], dtype=dtype)
    assert activation.gelu_tanh(x.to(device)).cpu()[0, :4].tolist() == [0.0, 300.0, 0.0, 0.0]
    assert torch.isfinite(activation.silu_and_mul(x.to(device))).all()


def test_a_view_and_no_tokens(device):
    x = random(6, 40).to(device)
    assert torch.equal(activation.gelu_tanh(x[:, ::2]), activation.gelu_tanh(x[:, ::2].clone()))
    assert torch.equal(activation.silu_and_mul(x[:, 4:20]), activation.silu_and_mul(x[:, 4:20].clone()))
    assert activation.silu_and_mul(x[:0]).shape == (0, 20)
