"""Copies of whole KV blocks."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.gpu import block_copy
from flashserve_kernels.gpu.ops import TritonOps
from flashserve_kernels.kv_cache import KVLayer
from kernel_comparison import DTYPES, poisoned, random


@pytest.mark.parametrize("dtype", (*DTYPES, torch.uint8))
@pytest.mark.parametrize("shape", [(2, 2, 4, 1, 4), (3, 2, 16, 2, 24), (4, 2, 16, 4, 64)])
@pytest.mark.parametrize("pair_dtype", [torch.int32, torch.int64])
def test_blocks_of_one_allocation(dtype, shape, pair_dtype, device):
    blocks = random(10, *shape, scale=50).to(dtype)
    pairs = torch.tensor([[3, 7], [3, 0], [9, 1], [-1, 2], [4, -1]], dtype=pair_dtype)
    on_device = blocks.clone().to(device)
    block_copy.copy_blocks(on_device, on_device, pairs.to(device))
    expected = blocks.clone()
    block_copy.copy_blocks_reference(expected, expected, pairs)
    assert torch.equal(on_device.cpu(), expected)
    assert torch.equal(expected[[7, 0, 1]], blocks[[3, 3, 9]])
    assert torch.equal(expected[[2, 3, 4, 5, 6, 8, 9]], blocks[[2, 3, 4, 5, 6, 8, 9]])


def test_blocks_of_another_allocation(device):
    """Offloading: the other side has its own number of blocks, and here another dtype for the same bytes."""
    blocks = random(6, 2, 2, 16, 2, 16, dtype=torch.bfloat16)
    host = poisoned(3, blocks[0].numel() // 2, dtype=torch.float32, device=device)
    block_copy.copy_blocks(blocks.to(device), host, torch.tensor([[5, 0], [2, 2]], device=device))
    found = host.cpu().view(torch.bfloat16).view(3, *blocks.shape[1:])
    assert torch.equal(found[[0, 2]], blocks[[5, 2]])
    assert bool(host[1].isnan().all())


@pytest.mark.parametrize("together", [False, True], ids=["layers apart", "layers together"])
def test_blocks_of_a_cache(together, device):
    """The op, on a CPU's layout and on a GPU's."""
    cache = random(*((7, 3, 2) if together else (3, 2, 7)), 4, 2, 8).to(device)
    views = cache.permute(1, 2, 0, 3, 4, 5) if together else cache
    before = views.clone()
    layers = [KVLayer(*layer.unbind(0)) for layer in views.unbind(0)]
    TritonOps(device).copy_blocks(layers, torch.tensor([[2, 5], [2, 0], [3, 6]], device=device))
    assert torch.equal(views, before[:, :, [2, 1, 2, 3, 4, 2, 3]])


def test_what_cannot_be_copied(device):
    blocks, pairs = random(4, 8, 8).to(device), torch.zeros((1, 2), dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="256 bytes cannot become blocks of 128"):
        block_copy.copy_blocks(blocks, random(4, 4, 8).to(device), pairs)
    with pytest.raises(ValueError, match="contiguous"):
        block_copy.copy_blocks(blocks.transpose(0, 1), blocks, pairs)
    before = blocks.clone()
    block_copy.copy_blocks(blocks, blocks, pairs[:0])
    assert torch.equal(blocks, before)
