"""Rotary embedding with the cache write, and the cache write alone."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels import rotary
from flashserve_kernels.gpu import rope_cache
from flashserve_kernels.kv_cache import KVLayer
from flashserve_kernels.ops import Ops
from kernel_comparison import DTYPES, assert_as_exact_as_torch, poisoned, random

E4M3 = torch.float8_e4m3fn
BLOCK_SIZE = 16


def poisoned_cache(kv_heads: int, head_dim: int, dtype: torch.dtype, device, *scales: float) -> KVLayer:
    """One layer's strided views of an allocation [blocks, layers, 2, slots, heads, D]."""
    shape = 4, 3, 2, BLOCK_SIZE, kv_heads, head_dim
    if dtype == E4M3:
        blocks = torch.full(shape, 0x7F, dtype=torch.uint8, device=device).view(E4M3)  # NaN
    else:
        blocks = poisoned(*shape, dtype=dtype, device=device)
    return KVLayer(blocks[:, 1, 0], blocks[:, 1, 1], *scales)


def stored(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """The entries of the slots: [T, heads, D] on the CPU."""
    return cache.cpu()[slots // BLOCK_SIZE, slots % BLOCK_SIZE]


def num_untouched(cache: torch.Tensor) -> int:
    return int(cache.cpu().float().isnan().all(-1).all(-1).sum())


def angles(tokens: int, head_dim: int) -> torch.Tensor:
    turn = random(tokens, head_dim // 2, seed=3, scale=10)
    return torch.cat((turn.cos(), turn.sin()), -1)


def exact_rotation(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    a, b = x[..., :half].double(), x[..., half:].double()
    cos, sin = cos_sin[:, None, :half].double(), cos_sin[:, None, half:].double()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [
    (4, 4, 32), (9, 3, 64), (4, 1, 80), (12, 2, 96), (7, 1, 112), (32, 8, 128), (2, 2, 256), (15, 5, 2),
])  # fmt: skip
def test_rotation_and_cache(dtype, heads, kv_heads, head_dim, device):
    slots = torch.tensor([17, 0, -1, 63, 16])
    qkv, cos_sin = random(5, heads + 2 * kv_heads, head_dim, dtype=dtype), angles(5, head_dim)
    cache = poisoned_cache(kv_heads, head_dim, dtype, device)
    on_device = qkv.clone().to(device)
    q = rope_cache.rope_and_cache(on_device, heads, cos_sin.to(device), cache, slots.to(device))
    assert q.data_ptr() == on_device.data_ptr() and q.shape == (5, heads, head_dim)

    turned = qkv[:, : heads + kv_heads]
    torchs = rotary.rotary_embedding_(turned.clone(), cos_sin)
    assert_as_exact_as_torch(on_device[:, : heads + kv_heads], torchs, exact_rotation(turned, cos_sin))
    assert torch.equal(on_device[:, heads + kv_heads :].cpu(), qkv[:, heads + kv_heads :])

    written = slots >= 0
    keys = on_device[:, heads : heads + kv_heads].cpu()
    assert torch.equal(stored(cache.k, slots[written]), keys[written])
    assert torch.equal(stored(cache.v, slots[written]), qkv[:, heads + kv_heads :][written])
    assert num_untouched(cache.k) == num_untouched(cache.v) == 4 * BLOCK_SIZE - 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm_dtype", [None, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 32), (4, 1, 80), (32, 8, 128), (2, 2, 256)])
def test_norms_before_the_rotation(dtype, norm_dtype, heads, kv_heads, head_dim, device):
    """Of queries and keys, each with its own weight; values, and slots that are not stored, stay as they are."""
    slots = torch.tensor([17, -1, 63])
    qkv, cos_sin = random(3, heads + 2 * kv_heads, head_dim, dtype=dtype), angles(3, head_dim)
    q_weight, k_weight = (random(head_dim, dtype=norm_dtype or dtype, seed=seed) for seed in (1, 2))
    cache = poisoned_cache(kv_heads, head_dim, dtype, device)
    on_device = qkv.clone().to(device)
    arguments = q_weight.to(device), k_weight.to(device), 1e-5, cos_sin.to(device), cache, slots.to(device)
    q = rope_cache.norm_rope_and_cache(on_device, heads, *arguments)
    assert q.data_ptr() == on_device.data_ptr() and q.shape == (3, heads, head_dim)

    torchs = Ops(torch.device("cpu"))
    expected, kept = qkv.clone(), KVLayer(*(torch.zeros(4, BLOCK_SIZE, kv_heads, head_dim, dtype=dtype) for _ in "kv"))
    torchs.norm_rope_and_cache(expected, heads, q_weight, k_weight, 1e-5, cos_sin, kept, slots)
    turned = qkv[:, : heads + kv_heads].double()
    weights = torch.stack([q_weight] * heads + [k_weight] * kv_heads).double()
    normed = turned / (turned.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weights
    assert_as_exact_as_torch(
        on_device[:, : heads + kv_heads], expected[:, : heads + kv_heads], exact_rotation(normed, cos_sin)
    )
    assert torch.equal(on_device[:, heads + kv_heads :].cpu(), qkv[:, heads + kv_heads :])
    written = slots >= 0
    assert torch.equal(stored(cache.k, slots[written]), on_device[:, heads : heads + kv_heads].cpu()[written])
    assert torch.equal(stored(cache.v, slots[written]), qkv[:, heads + kv_heads :][written])
    assert num_untouched(cache.k) == num_untouched(cache.v) == 4 * BLOCK_SIZE - 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv_heads, head_dim", [(1, 64), (3, 80), (12, 128)])
def test_write_kv(dtype, kv_heads, head_dim, device):
    """Keys and values of different strides, as gpt2's."""
    slots = torch.tensor([5, -1, 40])
    k = random(3, kv_heads + 2, head_dim, dtype=dtype)[:, 2:]
    v = random(3, kv_heads, head_dim, dtype=dtype, seed=1)
    cache = poisoned_cache(kv_heads, head_dim, dtype, device)
    rope_cache.write_kv(k.to(device), v.to(device), cache, slots.to(device))
    for new, layer in ((k, cache.k), (v, cache.v)):
        assert torch.equal(stored(layer, slots[[0, 2]]), new[[0, 2]])
        assert num_untouched(layer) == 4 * BLOCK_SIZE - 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3_holds_the_scaled_numbers(dtype, device):
    heads, kv_heads, head_dim = 4, 2, 128
    k_scale, v_scale = 0.37, 1.9
    slots = torch.tensor([3, 33, -1])
    qkv, cos_sin = random(3, heads + 2 * kv_heads, head_dim, dtype=dtype, scale=20), angles(3, head_dim)
    cache = poisoned_cache(kv_heads, head_dim, E4M3, device, k_scale, v_scale)
    on_device = qkv.clone().to(device)
    rope_cache.rope_and_cache(on_device, heads, cos_sin.to(device), cache, slots.to(device))
    k, v = on_device[:2, heads : heads + kv_heads].cpu(), qkv[:2, heads + kv_heads :]
    expected_k = (k.float() / k_scale).clamp(-448, 448).to(E4M3)
    expected_v = (v.float() / v_scale).clamp(-448, 448).to(E4M3)
    assert torch.equal(stored(cache.k.view(torch.uint8), slots[:2]), expected_k.view(torch.uint8))
    assert torch.equal(stored(cache.v.view(torch.uint8), slots[:2]), expected_v.view(torch.uint8))
    assert num_untouched(cache.k) == 4 * BLOCK_SIZE - 2
    again = poisoned_cache(kv_heads, head_dim, E4M3, device, k_scale, v_scale)
    rope_cache.write_kv(
        on_device[:, heads : heads + kv_heads], on_device[:, heads + kv_heads :], again, slots.to(device)
    )
    assert torch.equal(again.k.view(torch.uint8).cpu(), cache.k.view(torch.uint8).cpu())


def test_e4m3_of_every_kind_of_number(device):
    """Halfway cases, subnormals, both zeros, and saturation, against torch's conversion."""
    codes = torch.arange(127, dtype=torch.uint8).view(E4M3).float()  # all positive numbers
    middles = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, middles, middles.nextafter(codes[1:]), middles.nextafter(codes[:-1]), random(100) * 1e-3))
    x = torch.cat((x, -x, torch.tensor([1e-30, 447.0, 460.0, 1e6, float("inf"), -1e6])))
    x = torch.nn.functional.pad(x, (0, -len(x) % 32)).view(-1, 1, 32)
    slots = torch.arange(len(x))
    cache = poisoned_cache(1, 32, E4M3, device)
    rope_cache.write_kv(x.to(device), x.to(device), cache, slots.to(device))
    expected = x.clamp(-448, 448).to(E4M3).view(torch.uint8)
    assert torch.equal(stored(cache.k.view(torch.uint8), slots), expected)


def test_wrong_caches_are_refused(device):
    k = random(1, 2, 32).to(device)
    slots = torch.tensor([0], device=device)
    with pytest.raises(ValueError, match="takes no scales"):
        rope_cache.write_kv(k, k, poisoned_cache(2, 32, torch.float32, device, 2.0, 1.0), slots)
    cache = poisoned_cache(2, 32, torch.float32, device)
    with pytest.raises(ValueError, match="equal strides"):
        rope_cache.write_kv(k, k, KVLayer(cache.k, cache.v.contiguous()), slots)
