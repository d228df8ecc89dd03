"""The paged cache: views of every layout, and what a write changes."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.kv_cache import KVCacheSpec, KVLayer, allocate_kv_cache, block_bytes, copy_blocks, write_kv
from flashserve_kernels.rotary import rope_and_cache, rotary_embedding_

LAYERS, BLOCKS, BLOCK_SIZE, HEADS, DIM = 3, 7, 4, 2, 8


def contiguous_layers(dtype: torch.dtype = torch.float32) -> list[KVLayer]:
    spec = KVCacheSpec(LAYERS, BLOCK_SIZE, HEADS, DIM, dtype, dtype)
    return allocate_kv_cache(spec, BLOCKS, torch.device("cpu"))


def interleaved_layers() -> list[KVLayer]:
    """All layers of a block together, as on a GPU."""
    cache = torch.zeros(BLOCKS, LAYERS, 2, BLOCK_SIZE, HEADS, DIM)
    return [KVLayer(cache[:, layer, 0], cache[:, layer, 1]) for layer in range(LAYERS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_allocation_is_zero_and_its_views_do_not_overlap(dtype):
    layers = contiguous_layers(dtype)
    assert len(layers) == LAYERS
    views = [view for layer in layers for view in layer[:2]]
    for view in views:
        assert view.shape == (BLOCKS, BLOCK_SIZE, HEADS, DIM) and view.dtype == dtype
        assert not view.any()
    for number, view in enumerate(views):
        view.fill_(number + 1)
    assert [int(view.unique()) for view in views] == list(range(1, 2 * LAYERS + 1))


def test_allocation_takes_no_memory_before_it_is_used():
    def resident_bytes() -> int:
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1]) * 4096

    before = resident_bytes()
    spec = KVCacheSpec(8, 16, 8, 64, torch.bfloat16, torch.bfloat16)
    layers = allocate_kv_cache(spec, 4096, torch.device("cpu"))
    total = sum(view.nbytes for layer in layers for view in layer[:2])
    assert total == 4096 * block_bytes(spec) == 1 << 30
    assert resident_bytes() - before < 32 << 20
    layers[3].k[5].fill_(1)
    assert resident_bytes() - before < 32 << 20


@pytest.mark.parametrize("make_layers", [contiguous_layers, interleaved_layers])
def test_write_puts_each_token_in_its_slot_and_nothing_else(make_layers):
    layers = make_layers()
    k, v = torch.randn(5, HEADS, DIM), torch.randn(5, HEADS, DIM)
    slots = [27, 0, 13, 4, 3]
    write_kv(k, v, layers[1], torch.tensor(slots))
    expected_k, expected_v = torch.zeros(2, BLOCKS, BLOCK_SIZE, HEADS, DIM)
    for token, slot in enumerate(slots):
        expected_k[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = k[token]
        expected_v[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = v[token]
    assert torch.equal(layers[1].k, expected_k) and torch.equal(layers[1].v, expected_v)
    assert not any(view.any() for layer in (layers[0], layers[2]) for view in layer[:2])


@pytest.mark.parametrize("make_layers", [contiguous_layers, interleaved_layers])
def test_blocks_are_copied_in_all_layers(make_layers):
    layers = make_layers()
    for layer in layers:
        for view in layer[:2]:
            view.copy_(torch.randn_like(view))
    before = [view.clone() for layer in layers for view in layer[:2]]
    copy_blocks(layers, torch.tensor([[2, 5], [2, 0], [3, 6]]))
    for view, old in zip((view for layer in layers for view in layer[:2]), before, strict=True):
        assert torch.equal(view, old[[2, 1, 2, 3, 4, 2, 3]])


@pytest.mark.parametrize("make_layers", [contiguous_layers, interleaved_layers])
def test_rope_and_cache_rotates_then_stores(make_layers):
    layer = make_layers()[2]
    num_heads = 6
    qkv = torch.randn(4, num_heads + 2 * HEADS, DIM)
    before = qkv.clone()
    cos_sin, slots = torch.randn(4, DIM), torch.tensor([9, 10, 0, 27])
    q = rope_and_cache(qkv, num_heads, cos_sin, layer, slots)
    assert torch.equal(q, rotary_embedding_(before[:, :num_heads].clone(), cos_sin))
    keys = rotary_embedding_(before[:, num_heads : num_heads + HEADS].clone(), cos_sin)
    assert torch.equal(layer.k[slots // BLOCK_SIZE, slots % BLOCK_SIZE], keys)
    assert torch.equal(layer.v[slots // BLOCK_SIZE, slots % BLOCK_SIZE], before[:, num_heads + HEADS :])
