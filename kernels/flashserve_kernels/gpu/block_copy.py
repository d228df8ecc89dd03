"""Copies of whole KV blocks, all layers at once: copy-on-write, and offloading to pinned host memory.

Bound by memory, or by the bus: 2 bytes moved per byte of a block. A block of an 8B model (32 layers, 8 KV heads of
128, 16 tokens, 16 bits) is 2 MiB in one piece, so one launch copies any number of them at 90% or more of the copy
bandwidth from two blocks on.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

_WORDS = 4096  # 16 KiB per program: 8 loads of 16 bytes in flight per thread


@triton.jit
def copy_blocks_kernel(source_ptr, destination_ptr, pairs_ptr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    pair = tl.program_id(0)
    source = tl.load(pairs_ptr + 2 * pair).to(tl.int64)
    destination = tl.load(pairs_ptr + 2 * pair + 1).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (word < WORDS) & (source >= 0) & (destination >= 0)
    value = tl.load(source_ptr + source * WORDS + word, mask, other=0)
    tl.store(destination_ptr + destination * WORDS + word, value, mask)


def copy_blocks(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """Block ``pairs[i, 0]`` of source becomes block ``pairs[i, 1]`` of destination.

    source, destination: [num_blocks, ...], contiguous, with equal bytes per block (a multiple of 4); they may be one
    tensor, and either may lie in pinned host memory. pairs: [N, 2], int32 or int64, contiguous; a pair with a negative
    entry is skipped; no block is written twice, or written and read.
    """
    source, destination = _words(source), _words(destination)
    words = source.shape[1]
    if destination.shape[1] != words:
        raise ValueError(f"blocks of {4 * words} bytes cannot become blocks of {4 * destination.shape[1]} bytes")
    if pairs.numel():
        block = min(_WORDS, triton.next_power_of_2(words))
        grid = pairs.shape[0], triton.cdiv(words, block)
        launch(copy_blocks_kernel, grid, source, destination, pairs, WORDS=words, BLOCK=block)


def copy_blocks_reference(source: Tensor, destination: Tensor, pairs: Tensor) -> None:
    """:func:`copy_blocks` in torch."""
    used = pairs[(pairs >= 0).all(-1)].long()
    _words(destination)[used[:, 1]] = _words(source)[used[:, 0]]


def _words(blocks: Tensor) -> Tensor:
    """[num_blocks, words] int32, the same memory."""
    if not blocks.is_contiguous():
        raise ValueError("blocks must be contiguous: pass the whole allocation, not one layer's view")
    return blocks.view(blocks.shape[0], -1).view(torch.int32)


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever this launcher starts for a model: pairs are int64."""
    per_layer = (2, shape.block_size, shape.num_kv_heads, shape.head_dim)
    blocks = torch.empty((2, shape.num_layers, *per_layer), dtype=shape.cache_dtype, device="meta")
    pairs = torch.empty((1, 2), dtype=torch.int64, device="meta")
    yield from record(properties, lambda: copy_blocks(blocks, blocks, pairs))
