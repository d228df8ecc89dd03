"""Embedding rows, and a step's input tokens from the samples on the device."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.gpu import embedding
from kernel_comparison import DTYPES, random


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("hidden", [6, 576, 2050])
def test_embedding(dtype, ids_dtype, hidden, device):
    table = random(50, hidden, dtype=dtype)
    ids = torch.tensor([3, 49, 0, 3, 17], dtype=ids_dtype)
    assert torch.equal(embedding.embedding(table.to(device), ids.to(device)).cpu(), table[ids.long()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_embedding_is_scaled(dtype, device):
    table, ids = random(9, 2050, dtype=dtype), torch.tensor([8, 0, 8])
    scaled = embedding.embedding(table.to(device), ids.to(device), 25.298).cpu()
    assert torch.equal(scaled, (table[ids].float() * 25.298).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [6, 2050])
def test_embedding_is_added(dtype, hidden, device):
    x, table, ids = random(3, hidden, dtype=dtype), random(9, hidden, dtype=dtype, seed=1), torch.tensor([8, 0, 8])
    on_device = x.clone().to(device)
    assert embedding.add_embedding_(on_device, table.to(device), ids.to(device)) is on_device
    assert torch.equal(on_device.cpu(), x + table[ids])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 300])
def test_gather_tokens(dtype, num_tokens, device):
    """Tokens that the host gave, samples of a slot, and padding, which must be a row of every table."""
    generator = torch.Generator().manual_seed(0)
    last = torch.randint(0, 1000, (40,), generator=generator)
    ids = torch.randint(-1, 2, (num_tokens,), generator=generator).clamp(max=0).to(dtype) * 1
    ids = torch.where(ids < 0, ids, torch.arange(num_tokens, dtype=dtype) + 5000)
    slots = torch.randint(-1, 40, (num_tokens,), generator=generator).to(dtype)
    expected = embedding.gather_tokens_reference(ids, last, slots)
    on_device = ids.to(device), last.to(device), slots.to(device)
    result = embedding.gather_tokens(*on_device)
    assert result.dtype == torch.int64 and torch.equal(result.cpu(), expected)
    for token in range(num_tokens):
        given, slot = int(ids[token]), int(slots[token])
        assert int(expected[token]) == (given if given >= 0 else int(last[slot]) if slot >= 0 else 0)
    out = torch.full((num_tokens,), -7, device=device)
    assert embedding.gather_tokens(*on_device, out=out) is out and torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("num_rows", [0, 1, 300])
def test_scatter_tokens(num_rows, device):
    last = torch.arange(400) + 10_000
    slots = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:num_rows]
    slots[::7] = -1
    tokens = torch.arange(num_rows)
    expected = embedding.scatter_tokens_reference_(last.clone(), slots, tokens)
    on_device = last.clone().to(device)
    assert embedding.scatter_tokens_(on_device, slots.to(device), tokens.to(device)) is on_device
    assert torch.equal(on_device.cpu(), expected)
    assert int((expected != last).sum()) == num_rows - len(slots[::7])
