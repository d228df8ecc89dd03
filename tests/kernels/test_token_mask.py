"""Masks of tokens in torch, against a loop over every token."""

from __future__ import annotations

import pytest
import torch

from flashserve_kernels.token_mask import mask_logits_, num_words
from token_masks import masked_by_definition, random_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 1000])
def test_tokens_without_a_bit_are_ruled_out(dtype, vocab):
    logits = torch.randn(5, vocab).to(dtype)
    bits, rows = random_bits(3, vocab), torch.tensor([4, 0, 2])
    expected = masked_by_definition(logits, bits, rows)
    assert mask_logits_(logits, bits, rows) is logits
    assert torch.equal(logits, expected)


def test_nothing_is_masked_without_rows():
    logits = torch.randn(2, 40)
    expected = logits.clone()
    mask_logits_(logits, torch.empty((0, 2), dtype=torch.int32), torch.empty(0, dtype=torch.int64))
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("bits", "rows"),
    [
        (torch.zeros((1, 1), dtype=torch.int32), torch.tensor([0])),
        (torch.zeros((2, 2), dtype=torch.int32), torch.tensor([0])),
        (torch.zeros((1, 2), dtype=torch.int64), torch.tensor([0])),
        (torch.zeros((1, 2), dtype=torch.int32), torch.tensor([0], dtype=torch.int32)),
    ],
    ids=["too few words", "another number of rows", "bits in int64", "rows in int32"],
)
def test_what_has_another_form_is_refused(bits, rows):
    assert num_words(40) == 2
    with pytest.raises(ValueError, match=r"bits|rows"):
        mask_logits_(torch.randn(2, 40), bits, rows)
