"""Weights lie side by side, each on cache lines of its own, and a chunk leaves with its last weight."""

from __future__ import annotations

import mmap
import weakref

import pytest
import torch

from flashserve_kernels.cpu import memory
from flashserve_kernels.cpu.memory import Arena, map_huge


@pytest.fixture
def arena(monkeypatch: pytest.MonkeyPatch) -> Arena:
    monkeypatch.setattr(memory, "_CHUNK", 2 * mmap.PAGESIZE)
    return Arena()


def test_weights_share_pages_and_no_cache_line(arena: Arena) -> None:
    sizes = [1, 64, 65, 1000, mmap.PAGESIZE, 3]
    weights = [arena.allocate(size) for size in sizes]
    for number, weight in enumerate(weights):
        assert weight.data_ptr() % 64 == 0
        assert not weight.any()
        weight.fill_(number + 1)
    assert [weight.tolist() for weight in weights] == [[n + 1] * size for n, size in enumerate(sizes)]
    assert weights[3].data_ptr() - weights[0].data_ptr() == 64 + 64 + 128


def test_a_weight_larger_than_a_chunk_gets_a_chunk_of_its_size(arena: Arena) -> None:
    large = arena.allocate(5 * mmap.PAGESIZE)
    large.fill_(7)
    assert len(large) == 5 * mmap.PAGESIZE
    small = arena.allocate(10)
    assert len(small) == 10 and not small.any()


def test_a_chunk_can_be_filled_and_is_never_overrun(arena: Arena) -> None:
    sizes = [mmap.PAGESIZE, mmap.PAGESIZE, mmap.PAGESIZE, mmap.PAGESIZE + 1, 64]
    weights = [arena.allocate(size) for size in sizes]
    for number, weight in enumerate(weights):
        weight.fill_(number + 1)
    assert [(weight == n + 1).sum().item() for n, weight in enumerate(weights)] == sizes
    assert weights[1].data_ptr() - weights[0].data_ptr() == mmap.PAGESIZE, "both in the first chunk"
    assert not 0 < weights[3].data_ptr() - weights[2].data_ptr() < 2 * mmap.PAGESIZE, "no room for it there"


def test_memory_is_returned_with_the_last_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped: list[weakref.ref[mmap.mmap]] = []
    real = mmap.mmap

    def recording(*arguments: int, **options: int) -> mmap.mmap:
        pages = real(*arguments, **options)
        mapped.append(weakref.ref(pages))
        return pages

    monkeypatch.setattr(memory.mmap, "mmap", recording)
    arena = Arena()
    weights = [arena.allocate(100), arena.allocate(100)]
    del weights[0]
    assert [pages() is None for pages in mapped] == [False]
    weights.clear()
    assert [pages() is None for pages in mapped] == [True]
    assert not arena.allocate(100).any()


def test_mapped_memory_is_zero() -> None:
    assert torch.equal(map_huge(3 * mmap.PAGESIZE), torch.zeros(3 * mmap.PAGESIZE, dtype=torch.uint8))
