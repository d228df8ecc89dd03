"""Norms, activations, embeddings, rotary positions and linears against their definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from flashserve_kernels.activation import activate, activate_and_mul
from flashserve_kernels.embedding import embedding
from flashserve_kernels.linear import linear, pack_linear
from flashserve_kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from flashserve_kernels.rotary import rotary_embedding_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place of the result, and what a rounded intermediate may add.
RELATIVE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SHAPES = [(1, 64), (7, 96), (65, 576)]


def random(*shape: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Same dtype as asked for, and close to a float64 value."""
    assert actual.dtype == dtype
    tolerance = RELATIVE[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def naive_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x, weight = x.double(), weight.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def naive_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * weight.double() + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype, shape):
    x, weight = random(*shape, dtype=dtype), random(shape[1], dtype=dtype, seed=1)
    eps = 0.5  # large, so that leaving it out shows
    assert_near(rms_norm(x, weight, eps), naive_rms_norm(x, weight, eps), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_weights_in_float32(dtype):
    x, residual, weight = (
        random(9, 96, dtype=dtype),
        random(9, 96, dtype=dtype, seed=2),
        random(96, dtype=torch.float32),
    )
    assert_near(rms_norm(x, weight, 1e-6), naive_rms_norm(x, weight, 1e-6), dtype)
    total = x + residual
    normed, stored = add_rms_norm(x, residual, weight, 1e-6)
    assert torch.equal(stored, total)
    assert_near(normed, naive_rms_norm(total, weight, 1e-6), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_in_place_on_the_heads_of_a_strided_view(dtype):
    qkv, weight = random(5, 8, 16, dtype=dtype), random(16, dtype=dtype, seed=1)
    before = qkv.clone()
    heads = qkv[:, 2:5]
    result = rms_norm(heads, weight, 1e-6, out=heads)
    assert result.data_ptr() == heads.data_ptr()
    assert_near(qkv[:, 2:5], naive_rms_norm(before[:, 2:5], weight, 1e-6), dtype)
    assert torch.equal(qkv[:, :2], before[:, :2]) and torch.equal(qkv[:, 5:], before[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_with_the_residual_add(dtype, shape):
    x, residual = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[1], dtype=dtype, seed=2), random(shape[1], dtype=dtype, seed=3)
    total = x + residual  # in the tensors' own dtype, as without fusion
    normed, summed = add_rms_norm(x.clone(), residual, weight, 1e-5)
    assert torch.equal(summed, total)
    assert_near(normed, naive_rms_norm(total, weight, 1e-5), dtype)
    normed, summed = add_layer_norm(x.clone(), residual, weight, bias, 1e-5)
    assert torch.equal(summed, total)
    assert_near(normed, naive_layer_norm(total, weight, bias, 1e-5), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(dtype, shape):
    x = random(*shape, dtype=dtype) + 3
    weight, bias = random(shape[1], dtype=dtype, seed=1), random(shape[1], dtype=dtype, seed=2)
    assert_near(layer_norm(x, weight, bias, 0.5), naive_layer_norm(x, weight, bias, 0.5), dtype)


DEFINITIONS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_tanh": lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh()),
    "gelu": lambda x: 0.5 * x * (1 + (x / math.sqrt(2)).erf()),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_activations(dtype, name):
    gate_up = random(9, 2 * 48, dtype=dtype, scale=3)
    before = gate_up.clone()
    gate, up = gate_up[:, :48].double(), gate_up[:, 48:].double()
    assert_near(activate(gate_up, name), DEFINITIONS[name](gate_up.double()), dtype)
    assert_near(activate_and_mul(gate_up, name), DEFINITIONS[name](gate) * up, dtype)
    assert torch.equal(gate_up, before)


def test_an_activation_that_there_is_not():
    with pytest.raises(ValueError, match="no activation 'relu'; there are silu, gelu_tanh, gelu"):
        activate(torch.zeros(2), "relu")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_embedding(dtype):
    table = random(20, 6, dtype=torch.float32)
    ids = torch.tensor([3, 19, 0, 3], dtype=dtype)
    assert torch.equal(embedding(table, ids), torch.stack([table[3], table[19], table[0], table[3]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 16, 24, 128])
def test_rotary_embedding(dtype, head_dim):
    """Pair i of a head, (x[i], x[i + D/2]), turns by the token's i-th angle; other heads stay."""
    x = random(5, 6, head_dim, dtype=dtype)
    before = x.clone()
    angles = random(5, head_dim // 2, dtype=torch.float32, seed=1, scale=10)
    rotary_embedding_(x[:, 1:4], torch.cat((angles.cos(), angles.sin()), -1))
    pairs = torch.complex(before[..., : head_dim // 2].double(), before[..., head_dim // 2 :].double())
    turned = pairs * torch.polar(torch.ones_like(angles, dtype=torch.float64), angles.double())[:, None]
    assert_near(x[:, 1:4], torch.cat((turned.real, turned.imag), -1)[:, 1:4], dtype)
    assert torch.equal(x[:, 0], before[:, 0]) and torch.equal(x[:, 4:], before[:, 4:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 16, 33])
def test_linear_with_a_packed_weight(dtype, bias, rows):
    weight = random(80, 48, dtype=dtype, scale=0.1)
    x, b = random(rows, 48, dtype=dtype, seed=1), random(80, dtype=dtype, seed=2)
    expected = x.double() @ weight.double().t() + (b.double() if bias else 0)
    assert_near(linear(x, pack_linear(weight), b if bias else None), expected, dtype)
