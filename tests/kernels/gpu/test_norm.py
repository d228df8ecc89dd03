"""Norms in Triton-lang against float64 and torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashserve_kernels.gpu import norm
from kernel_comparison import DTYPES, assert_as_exact_as_torch, poisoned, random

SHAPES = [(1, 64), (3, 96), (17, 576), (2, 896), (2, 4096), (1, 5120), (2, 16384)]


def exact_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    x = x.double()
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return normed if bias is None else normed + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm(dtype, shape, eps, device):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    out = poisoned(*shape, dtype=dtype, device=device)
    result = norm.rms_norm(x.to(device), weight.to(device), eps, out=out)
    assert result is out
    torchs = F.rms_norm(x, weight.shape, weight, eps)
    assert_as_exact_as_torch(result, torchs, exact_norm(x, weight, None, eps))
    assert torch.equal(norm.rms_norm(x.to(device), weight.to(device), eps), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_weights_in_float32(dtype, device):
    x, weight = random(3, 96, dtype=dtype), random(96, seed=1)
    result = norm.rms_norm(x.to(device), weight.to(device), 1e-6)
    torchs = F.rms_norm(x, weight.shape, weight.to(dtype), 1e-6)
    assert_as_exact_as_torch(result, torchs, exact_norm(x, weight, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 80, 128])
def test_rms_norm_in_place_on_the_heads_of_a_view(dtype, head_dim, device):
    """As query and key norms use it; the heads beside them stay as they are."""
    qkv, weight = random(5, 12, head_dim, dtype=dtype), random(head_dim, dtype=dtype, seed=1)
    on_device = qkv.clone().to(device)
    heads = on_device[:, 3:10]
    assert norm.rms_norm(heads, weight.to(device), 1e-6, out=heads) is heads
    part = qkv[:, 3:10]
    assert_as_exact_as_torch(heads, F.rms_norm(part, weight.shape, weight, 1e-6), exact_norm(part, weight, None, 1e-6))
    assert torch.equal(on_device[:, :3].cpu(), qkv[:, :3]) and torch.equal(on_device[:, 10:].cpu(), qkv[:, 10:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(dtype, shape, device):
    x = random(*shape, dtype=dtype) + 3
    weight, bias = random(shape[1], dtype=dtype, seed=1), random(shape[1], dtype=dtype, seed=2)
    result = norm.layer_norm(x.to(device), weight.to(device), bias.to(device), 1e-5)
    torchs = F.layer_norm(x, weight.shape, weight, bias, 1e-5)
    assert_as_exact_as_torch(result, torchs, exact_norm(x, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_after_the_residual_add(dtype, shape, device):
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[1], dtype=dtype, seed=2), random(shape[1], dtype=dtype, seed=3)
    total = x + residual
    inputs = residual.to(device), weight.to(device)
    normed, summed = norm.add_rms_norm(x.clone().to(device), *inputs, 1e-5)
    assert torch.equal(summed.cpu(), total)
    assert_as_exact_as_torch(
        normed, F.rms_norm(total, weight.shape, weight, 1e-5), exact_norm(total, weight, None, 1e-5)
    )
    normed, summed = norm.add_layer_norm(x.clone().to(device), *inputs, bias.to(device), 1e-5)
    assert torch.equal(summed.cpu(), total)
    torchs = F.layer_norm(total, weight.shape, weight, bias, 1e-5)
    assert_as_exact_as_torch(normed, torchs, exact_norm(total, weight, bias, 1e-5))
    assert torch.equal(inputs[0].cpu(), residual)


def test_rows_of_a_wider_matrix(device):
    x, weight = random(4, 200).to(device), random(96, seed=1).to(device)
    assert torch.equal(norm.rms_norm(x[:, 50:146], weight, 1e-6), norm.rms_norm(x[:, 50:146].clone(), weight, 1e-6))


def test_no_rows_and_wrong_strides(device):
    weight = random(96).to(device)
    assert norm.rms_norm(random(0, 96).to(device), weight, 1e-6).shape == (0, 96)
    with pytest.raises(ValueError, match="contiguous rows"):
        norm.rms_norm(random(96, 96).to(device).t(), weight, 1e-6)
