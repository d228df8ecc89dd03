"""Rows of an embedding table, and the tokens whose rows they are: see :mod:`flashserve_kernels.embedding`.

A decode step's input tokens are the last step's samples. They stay on the device, in an array with an entry per
*slot* (a running request's place), so that the host can submit a step before it has seen the samples of the one
before: :func:`scatter_tokens_` after sampling, :func:`gather_tokens` before the embedding.

Bound by memory: 4 bytes per element of a 16-bit table (6 where the row is added), a row per program column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashserve_kernels.gpu.device import GPUProperties
from flashserve_kernels.gpu.launch import ModelShape, Variant, launch, record

_BLOCK = 1024
_TOKENS = 256


@triton.jit
def embedding_kernel(
    table_ptr,
    ids_ptr,
    out_ptr,
    table_stride,
    out_stride,
    scale,  # None: 1, and the table is of any dtype
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < D
    row = tl.load(ids_ptr + token).to(tl.int64)
    value = tl.load(table_ptr + row * table_stride + column, mask)
    out_at = out_ptr + token * out_stride + column
    if scale is not None:
        value = value.to(tl.float32) * scale
    if ADD:
        value = value.to(tl.float32) + tl.load(out_at, mask).to(tl.float32)
    tl.store(out_at, value.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["num_tokens"])
def gather_tokens_kernel(ids_ptr, last_ptr, slots_ptr, out_ptr, num_tokens, BLOCK: tl.constexpr):
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = token < num_tokens
    given = tl.load(ids_ptr + token, mask, other=0).to(tl.int64)
    slot = tl.load(slots_ptr + token, mask, other=0).to(tl.int64)
    last = tl.load(last_ptr + slot, mask & (given < 0) & (slot >= 0), other=0).to(tl.int64)
    tl.store(out_ptr + token, tl.where(given < 0, last, given), mask)


@triton.jit(do_not_specialize=["num_rows"])
def scatter_tokens_kernel(last_ptr, slots_ptr, tokens_ptr, num_rows, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, row < num_rows, other=-1).to(tl.int64)
    mask = slot >= 0
    token = tl.load(tokens_ptr + row, mask, other=0)
    tl.store(last_ptr + slot, token.to(last_ptr.dtype.element_ty), mask)


def embedding(table: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
    """``table[ids] * scale``. table: [V, D]; ids: [T], int32 or int64, each in [0, V). Returns [T, D]."""
    out = table.new_empty((ids.shape[0], table.shape[1]))
    _embed(table, ids, out, add=False, scale=scale)
    return out


def add_embedding_(x: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """``x += table[ids]``. x: [T, D], rows contiguous; the rest as in :func:`embedding`. Returns x."""
    _embed(table, ids, x, add=True)
    return x


def _embed(table: Tensor, ids: Tensor, out: Tensor, *, add: bool, scale: float = 1.0) -> None:
    if out.numel() == 0:
        return
    hidden = table.shape[1]
    block = min(_BLOCK, triton.next_power_of_2(hidden))
    grid = ids.shape[0], triton.cdiv(hidden, block)
    factor = None if scale == 1.0 else float(scale)
    launch(
        embedding_kernel, grid, table, ids, out, table.stride(0), out.stride(0), factor, D=hidden, BLOCK=block, ADD=add
    )  # fmt: skip


def gather_tokens(token_ids: Tensor, last_tokens: Tensor, slots: Tensor, out: Tensor | None = None) -> Tensor:
    """A step's input tokens: ``token_ids[t]`` where the host gave one (>= 0), else ``last_tokens[slots[t]]``.

    token_ids, slots: [T], int32 or int64; last_tokens: [S], likewise; out: [T] int64. A token with neither (padding:
    both are negative) becomes 0, which is a row of every table. Returns out, or a new tensor.
    """
    out = torch.empty_like(token_ids, dtype=torch.int64) if out is None else out
    num_tokens = token_ids.numel()
    if num_tokens:
        grid = (triton.cdiv(num_tokens, _TOKENS),)
        launch(gather_tokens_kernel, grid, token_ids, last_tokens, slots, out, num_tokens, BLOCK=_TOKENS)
    return out


def gather_tokens_reference(token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
    """:func:`gather_tokens` in torch."""
    last = torch.where(slots >= 0, last_tokens[slots.long().clamp(min=0)].long(), 0)
    return torch.where(token_ids >= 0, token_ids.long(), last)


def scatter_tokens_(last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """``last_tokens[slots[r]] = tokens[r]`` where ``slots[r] >= 0``: a step's samples, for the next step's input.

    last_tokens: [S]; slots, tokens: [R]; each int32 or int64; slots that are not negative differ. Returns last_tokens.
    """
    if slots.numel():
        grid = (triton.cdiv(slots.numel(), _TOKENS),)
        launch(scatter_tokens_kernel, grid, last_tokens, slots, tokens, slots.numel(), BLOCK=_TOKENS)
    return last_tokens


def scatter_tokens_reference_(last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """:func:`scatter_tokens_` in torch."""
    used = slots >= 0
    last_tokens[slots[used].long()] = tokens[used].to(last_tokens.dtype)
    return last_tokens


def variants(properties: GPUProperties, shape: ModelShape) -> Iterator[Variant]:
    """Whatever these launchers start for a model; token ids and slots are int64."""
    table = torch.empty((shape.vocab_size, shape.hidden_size), dtype=shape.dtype, device="meta")
    x = torch.empty((2, shape.hidden_size), dtype=shape.dtype, device="meta")
    ids = torch.empty(2, dtype=torch.int64, device="meta")

    def calls() -> None:
        embedding(table, ids, shape.embedding_scale)
        add_embedding_(x, table, ids)
        gather_tokens(ids, ids, ids)
        scatter_tokens_(ids, ids, ids)

    yield from record(properties, calls)
