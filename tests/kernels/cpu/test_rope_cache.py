"""Rotary and cache writes in C++ on every instruction set: the layout element by element."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels import KVCacheSpec
from flashserve_kernels.cpu.kv_cache import (
    allocate_packed_kv_cache,
    copy_blocks,
    packed_block_bytes,
    rope_and_cache,
    write_kv,
)
from flashserve_kernels.cpu.program import Program
from flashserve_kernels.recording import TOKENS
from packed_cache import read_slots, views

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
BLOCKS = 9


def make_cache(block_size, kv_heads, dim, dtype, kv_dtype=None):
    return allocate_packed_kv_cache(KVCacheSpec(2, block_size, kv_heads, dim, dtype, kv_dtype or dtype), BLOCKS)[1]


def some_slots(block_size, count):
    return torch.randperm(BLOCKS * block_size)[:count]


def rotated(x, cos_sin):
    a, b = x.double().chunk(2, dim=-1)
    cos, sin = cos_sin.double()[:, None].chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 24, 128])
@pytest.mark.parametrize("dim", [16, 80, 128])
def test_written_tokens_are_found_again_and_nothing_else_changes(pool, dtype, block_size, dim):
    cache, slots = make_cache(block_size, 3, dim, dtype), some_slots(block_size, 50)
    cache.memory.random_(0, 255)
    before = cache.memory.clone()
    qkv = torch.randn(50, 10, dim).to(dtype)  # keys and values are parts of a fused projection
    k, v = qkv[:, 4:7], qkv[:, 7:]
    write_kv(pool, k, v, cache, slots)
    found_k, found_v = read_slots(cache, slots)
    assert torch.equal(found_k, k.double())
    assert torch.equal(found_v, v.double())
    changed = (cache.memory != before).sum()
    assert changed <= 2 * 50 * 3 * dim * dtype.itemsize
    others = torch.ones(BLOCKS * block_size, dtype=torch.bool)
    others[slots] = False
    now = [x.nan_to_num() for x in read_slots(cache, others.nonzero()[:, 0])]
    cache.memory.copy_(before)
    for x, old in zip(now, read_slots(cache, others.nonzero()[:, 0]), strict=True):
        assert torch.equal(x, old.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 64, 80, 256])
@pytest.mark.parametrize("tokens", [1, 200])
def test_rotary(pool, dtype, dim, tokens):
    cache = allocate_packed_kv_cache(KVCacheSpec(1, 16, 2, dim, dtype, dtype), 20)[0]
    wide, slots = torch.randn(tokens, 9, dim).to(dtype), torch.randperm(20 * 16)[:tokens]
    qkv, before, cos_sin = wide[:, :8], wide.clone(), torch.randn(tokens, dim + 2)[:, :dim]
    q = rope_and_cache(pool, qkv, 4, cos_sin, cache, slots)
    assert q.data_ptr() == qkv.data_ptr()
    assert q.shape == (tokens, 4, dim)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(qkv[:, :6].double(), rotated(before[:, :6], cos_sin), rtol=tolerance, atol=2 * tolerance)
    assert torch.equal(wide[:, 6:], before[:, 6:])
    k, v = read_slots(cache, slots)
    assert torch.equal(k, qkv[:, 4:6].double())  # what is stored is what was rounded
    assert torch.equal(v, qkv[:, 6:8].double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_without_a_slot_are_rotated_but_not_stored(pool, dtype):
    cache = make_cache(16, 2, 32, dtype)
    qkv, cos_sin = torch.randn(5, 6, 32).to(dtype), torch.randn(5, 32)
    slots = torch.tensor([3, -1, 20, -1, -1])
    expected = rotated(qkv[:, :4], cos_sin)
    rope_and_cache(pool, qkv, 2, cos_sin, cache, slots)
    torch.testing.assert_close(qkv[:, :4].double(), expected, rtol=0.01, atol=0.02)
    k, _ = read_slots(cache, torch.arange(BLOCKS * 16))
    assert k.flatten(1).any(-1).nonzero()[:, 0].tolist() == [3, 20]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 24])
def test_int8_is_symmetric_per_token_and_head(pool, dtype, block_size):
    cache, slots = make_cache(block_size, 2, 64, dtype, torch.int8), some_slots(block_size, 40)
    k, v = (torch.randn(2, 40, 2, 64) * torch.logspace(-3, 3, 40)[:, None, None]).to(dtype)
    k[7] = 0
    write_kv(pool, k, v, cache, slots)
    keys, _, _ = views(cache)
    block, offset = slots // block_size, slots % block_size
    largest = keys[block, :, offset].abs().amax(-1)
    assert largest[7].tolist() == [0, 0]
    assert (largest[torch.arange(40) != 7] == 127).all()
    for found, x in zip(read_slots(cache, slots), (k, v), strict=True):
        # Half a step, and float32's rounding of the scale.
        step = x.double().abs().amax(-1, keepdim=True) / 127
        assert ((found - x.double()).abs() <= step * 0.501).all()


def test_a_recorded_program_serves_every_number_of_tokens(pool):
    cache = make_cache(16, 2, 32, torch.bfloat16)
    qkv, cos_sin, slots = torch.randn(30, 6, 32).bfloat16(), torch.randn(30, 32), some_slots(16, 30)
    program = Program(pool, (30, 1, 1))
    for tensor in (qkv, cos_sin, slots):
        program.add_input(tensor, TOKENS)
    with program.recording():
        rope_and_cache(pool, qkv, 2, cos_sin, cache, slots)
    for tokens in (30, 1, 13):
        cache.memory.zero_()
        program.run(tokens, 0, 0)
        k, v = read_slots(cache, slots)
        assert torch.equal(k[:tokens], qkv[:tokens, 2:4].double())
        assert torch.equal(v[:tokens], qkv[:tokens, 4:].double())
        assert not k[tokens:].any()


def test_memory_is_untouched_until_written_and_blocks_are_rows():
    spec = KVCacheSpec(4, 16, 8, 128, torch.bfloat16, torch.bfloat16)
    layers = allocate_packed_kv_cache(spec, 1 << 14)  # 4 GB of addresses
    assert len(layers) == 4
    assert layers[0].memory.shape == (1 << 14, packed_block_bytes(spec) // 4)
    assert layers[0].memory.untyped_storage().data_ptr() == layers[3].memory.untyped_storage().data_ptr()
    assert not layers[3].memory[-1].any()


def test_wrong_arguments_are_refused(pool):
    with pytest.raises(ValueError, match="multiple of 16"):
        packed_block_bytes(KVCacheSpec(1, 16, 1, 40, torch.bfloat16, torch.bfloat16))
    with pytest.raises(ValueError, match="or int8"):
        allocate_packed_kv_cache(KVCacheSpec(1, 16, 1, 16, torch.bfloat16, torch.float16), 1)
    cache, slots = make_cache(16, 2, 32, torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    k = torch.zeros(1, 2, 32)
    with pytest.raises(ValueError, match="cache holds"):
        write_kv(pool, k, k, cache, slots)
    with pytest.raises(ValueError, match="int64"):
        write_kv(pool, k.bfloat16(), k.bfloat16(), cache, slots.int())


def test_blocks_are_copied_in_all_layers():
    layers = allocate_packed_kv_cache(KVCacheSpec(3, 24, 2, 16, torch.bfloat16, torch.int8), 7)
    for layer in layers:
        layer.memory.random_(256)
    before = [layer.memory.clone() for layer in layers]
    copy_blocks(layers, torch.tensor([[2, 5], [2, 0], [3, 6]]))
    for layer, old in zip(layers, before, strict=True):
        assert torch.equal(layer.memory, old[[2, 1, 2, 3, 4, 2, 3]])
