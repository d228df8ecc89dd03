"""Masks of tokens in Triton-lang."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.gpu.token_mask import mask_logits_
from flashserve_kernels.token_mask import mask_logits_ as reference
from token_masks import random_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 33, 4096, 5000])
def test_the_references_logits(device, dtype, vocab):
    logits = torch.randn(6, vocab + 3).to(dtype)[:, :vocab].to(device)  # rows with a gap
    bits, rows = random_bits(4, vocab), torch.tensor([5, 1, 0, 3])
    expected = reference(logits.cpu(), bits, rows)
    assert mask_logits_(logits, bits.to(device), rows.to(device)) is logits
    assert torch.equal(logits.cpu(), expected)


def test_without_rows_nothing_is_started(device):
    logits = torch.randn(2, 40, device=device)
    bits = torch.empty((0, 2), dtype=torch.int32, device=device)
    mask_logits_(logits, bits, torch.empty(0, dtype=torch.int64, device=device))
    assert bool(logits.isfinite().all())
