"""The tokens that a step reads and writes, by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import Pool, emit, empty, rows_of


def gather_tokens(pool: Pool, token_ids: Tensor, last_tokens: Tensor, slots: Tensor) -> Tensor:
    """``token_ids`` [T], where negative ``last_tokens[slots]``; all int64 and contiguous. Returns [T] int64."""
    _check(token_ids, last_tokens, slots)
    rows = rows_of(token_ids)
    out = empty(rows, (), torch.int64)
    emit(pool, program.GATHER_TOKENS, torch.float32, rows, (token_ids, last_tokens, slots, out))
    return out


def scatter_tokens_(pool: Pool, last_tokens: Tensor, slots: Tensor, tokens: Tensor) -> None:
    """``last_tokens[slots] = tokens``; all int64 and contiguous, slots and tokens: [N]."""
    _check(last_tokens, slots, tokens)
    emit(pool, program.SCATTER_TOKENS, torch.float32, rows_of(slots), (last_tokens, slots, tokens))


def _check(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.dtype != torch.int64 or tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"tokens and slots must be contiguous int64, not {tensor.dtype} {tuple(tensor.shape)}")
