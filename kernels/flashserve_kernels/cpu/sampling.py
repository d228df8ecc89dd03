"""From logits to token ids, penalties on logits, and log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import Pool, emit, empty, rows_of
from flashserve_kernels.logprobs import Logprobs, check_num_top
from flashserve_kernels.sampling import Stage

_TOKENS, _PENALTIES, _COUNT_TOKENS, _LOG_PROBABILITIES = range(4)
"""sample.cpp's Which."""


def greedy(pool: Pool, logits: Tensor) -> Tensor:
    """The most probable token of each row, the first of equals. logits: [N, V]. Returns [N] int64."""
    _check_logits(logits)
    rows = rows_of(logits)
    out = empty(rows, (), torch.int64)
    emit(pool, program.SAMPLE, logits.dtype, rows, (logits, out), (_TOKENS, logits.shape[1], logits.stride(0)))
    return out


def sample(
    pool: Pool,
    logits: Tensor,
    temperature: Tensor,
    min_p: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    seeds: Tensor,
    positions: Tensor,
    slots: Tensor | None = None,
) -> Tensor:
    """One token per row: greedy where the temperature is 0, else drawn as :func:`flashserve_kernels.sampling.sample`
    does.

    logits: [N, V]; positions: [N] int64. By slot, or by row where ``slots`` ([N] int64) is None, with any stride:
    temperature, min_p (0 is off), top_p (1 is off): float32; top_k (0 is off), seeds: int64; None where no row uses it.
    Returns [N] int64. The noise has the reference's bits; its logarithms differ by up to 2e-6.
    """
    _check_logits(logits)
    columns = (temperature, min_p, top_k, top_p, seeds)
    for column in columns:
        dtype = torch.int64 if column is top_k or column is seeds else torch.float32
        if column is not None and (column.dim() != 1 or column.dtype != dtype):
            raise ValueError(f"expected a vector of {dtype}, not {column.dtype} {tuple(column.shape)}")
    for vector in (positions, *(() if slots is None else (slots,))):
        _check_vector(vector, torch.int64)
    rows = rows_of(logits)
    out = empty(rows, (), torch.int64)
    strides = (0 if column is None else column.stride(0) for column in columns)
    emit(pool, program.SAMPLE, logits.dtype, rows, (logits, out, *columns, positions, slots),
         (_TOKENS, logits.shape[1], logits.stride(0), *strides))  # fmt: skip
    return out


def sample_rows(
    pool: Pool,
    logits: Tensor,
    slots: Tensor,
    positions: Tensor,
    stages: Stage,
    *,
    temperature: Tensor,
    min_p: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
) -> Tensor:
    """As :func:`flashserve_kernels.sampling.sample_rows`."""
    if Stage.RANDOM not in stages:
        return greedy(pool, logits)
    return sample(
        pool,
        logits,
        temperature,
        min_p if Stage.MIN_P in stages else None,
        top_k if Stage.TOP_K in stages else None,
        top_p if Stage.TOP_P in stages else None,
        seed,
        positions,
        slots,
    )


def apply_penalties_(
    pool: Pool,
    logits: Tensor,
    slots: Tensor,
    counts: Tensor,
    in_prompt: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """As :func:`flashserve_kernels.penalties.apply_penalties_`."""
    _check_logits(logits)
    _check_table(counts, torch.int32, logits.shape[1])
    _check_table(in_prompt, torch.bool, logits.shape[1])
    _check_vector(slots, torch.int64)
    for vector in (repetition, presence, frequency):
        _check_vector(vector, torch.float32)
    emit(pool, program.SAMPLE, logits.dtype, rows_of(logits),
         (logits, slots, counts, in_prompt, repetition, presence, frequency),
         (_PENALTIES, logits.shape[1], logits.stride(0), counts.stride(0), in_prompt.stride(0)))  # fmt: skip
    return logits


def count_tokens_(pool: Pool, counts: Tensor, slots: Tensor, tokens: Tensor) -> Tensor:
    """As :func:`flashserve_kernels.penalties.count_tokens_`."""
    _check_table(counts, torch.int32, counts.shape[1])
    _check_vector(slots, torch.int64)
    _check_vector(tokens, torch.int64)
    emit(pool, program.SAMPLE, torch.float32, rows_of(tokens), (counts, slots, tokens),
         (_COUNT_TOKENS, counts.shape[1], counts.stride(0)))  # fmt: skip
    return counts


def log_probabilities(pool: Pool, logits: Tensor, tokens: Tensor, num_top: int) -> Logprobs:
    """As :func:`flashserve_kernels.logprobs.log_probabilities`."""
    _check_logits(logits)
    _check_vector(tokens, torch.int64)
    check_num_top(num_top, logits.shape[1])
    rows = rows_of(logits)
    chosen, rank = empty(rows, (), torch.float32), empty(rows, (), torch.int64)
    top, top_tokens = empty(rows, (num_top,), torch.float32), empty(rows, (num_top,), torch.int64)
    emit(pool, program.SAMPLE, logits.dtype, rows, (logits, tokens, chosen, rank, top, top_tokens),
         (_LOG_PROBABILITIES, logits.shape[1], logits.stride(0), num_top))  # fmt: skip
    return Logprobs(chosen, rank, top, top_tokens)


def _check_table(x: Tensor, dtype: torch.dtype, columns: int) -> None:
    if x.dim() != 2 or x.dtype != dtype or x.shape[1] != columns or x.stride(1) != 1:
        raise ValueError(f"expected [slots, {columns}] of {dtype}, not {x.dtype} {tuple(x.shape)} {x.stride()}")


def _check_logits(logits: Tensor) -> None:
    if logits.dim() != 2 or logits.stride(1) != 1 or not logits.dtype.is_floating_point:
        raise ValueError(f"logits must be [N, V] with adjacent columns, not {logits.dtype} {tuple(logits.shape)}")


def _check_vector(x: Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 1 or x.dtype != dtype or not x.is_contiguous():
        raise ValueError(f"expected a contiguous vector of {dtype}, not {x.dtype} {tuple(x.shape)} {x.stride()}")
