"""Activations in Triton-lang against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels import activation as reference
from flashserve_kernels.gpu import activation
from kernel_comparison import DTYPES, assert_as_exact_as_torch, random

NAMES = ("silu", "gelu_tanh", "gelu")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, width", [(1, 7), (5, 1536), (3, 2048), (2, 14336)])
def test_gated(name, dtype, tokens, width, device):
    gate_up = random(tokens, 2 * width, dtype=dtype, scale=3)
    before = gate_up.clone()
    result = activation.activate_and_mul(gate_up.to(device), name)
    exact = reference.activate_and_mul(gate_up.double(), name)
    assert_as_exact_as_torch(result, reference.activate_and_mul(gate_up, name), exact)
    assert torch.equal(gate_up, before)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (5, 3072), (2, 3, 700)])
def test_alone(name, dtype, shape, device):
    x = random(*shape, dtype=dtype, scale=2)
    exact = reference.activate(x.double(), name)
    assert_as_exact_as_torch(activation.activate(x.to(device), name), reference.activate(x, name), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [1.5, 30.0])
def test_soft_cap(dtype, cap, device):
    x = random(3, 3000, dtype=dtype, scale=20)
    exact = reference.soft_cap_(x.double(), cap)
    torchs = reference.soft_cap_(x.clone(), cap)
    on_device = x.to(device)
    assert activation.soft_cap_(on_device, cap) is on_device
    assert_as_exact_as_torch(on_device, torchs, exact)
    with pytest.raises(ValueError, match="contiguous"):
        activation.soft_cap_(on_device[:, ::2], cap)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extremes_stay_finite(dtype, device):
    x = torch.tensor([[-300.0, 300.0, -20.0, 0.0, 100.0, 200.0, 1.0, 1.0]], dtype=dtype)
    assert activation.activate(x.to(device), "gelu_tanh").cpu()[0, :4].tolist() == [0.0, 300.0, 0.0, 0.0]
    for name in NAMES:
        assert torch.isfinite(activation.activate_and_mul(x.to(device), name)).all()


def test_a_view_and_no_tokens(device):
    x = random(6, 40).to(device)
    assert torch.equal(activation.activate(x[:, ::2], "gelu"), activation.activate(x[:, ::2].clone(), "gelu"))
    part = x[:, 4:20]
    assert torch.equal(activation.activate_and_mul(part, "silu"), activation.activate_and_mul(part.clone(), "silu"))
    assert activation.activate_and_mul(x[:0], "silu").shape == (0, 20)
