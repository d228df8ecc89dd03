"""Masks of tokens in C++ on every instruction set."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.cpu.token_mask import mask_logits_
from flashserve_kernels.token_mask import mask_logits_ as reference
from token_masks import random_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 32, 33, 16_384, 49_152, 50_257])
def test_the_references_logits(pool, dtype, vocab):
    logits = torch.randn(6, vocab + 3).to(dtype)[:, :vocab]  # rows with a gap
    logits[1, 0] = float("nan")
    bits, rows = random_bits(4, vocab), torch.tensor([5, 1, 0, 3])
    expected = reference(logits.clone(), bits, rows)
    assert mask_logits_(pool, logits, bits, rows) is logits
    assert torch.equal(logits.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))
