"""Tokens that a row may not choose: see :mod:`flashserve_kernels.token_mask`."""

from __future__ import annotations

from torch import Tensor

from flashserve_kernels.cpu import program
from flashserve_kernels.cpu.program import Pool, emit, rows_of
from flashserve_kernels.token_mask import check


def mask_logits_(pool: Pool, logits: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
    """As :func:`flashserve_kernels.token_mask.mask_logits_`."""
    check(logits, bits, rows)
    emit(pool, program.MASK_LOGITS, logits.dtype, rows_of(rows), (logits, bits, rows),
         (logits.shape[1], logits.stride(0), bits.shape[1]))  # fmt: skip
    return logits
