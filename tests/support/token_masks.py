"""Masks of tokens for tests, and what they mean."""

from __future__ import annotations

import torch

from flashserve_kernels.token_mask import num_words


def random_bits(rows: int, vocab: int, seed: int = 0) -> torch.Tensor:
    """[rows, words] int32; a third of the words are full, a third are empty, as a grammar's are."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, num_words(vocab) + 1)  # one word more than is needed, as a tokenizer may know more tokens
    bits = torch.randint(-(1 << 31), 1 << 31, shape, generator=generator)
    kind = torch.randint(3, shape, generator=generator)
    return torch.where(kind == 0, -1, torch.where(kind == 1, 0, bits)).to(torch.int32)


def masked_by_definition(logits: torch.Tensor, bits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A copy of the logits, masked token by token."""
    masked = logits.clone()
    for words, row in zip(bits.tolist(), rows.tolist(), strict=True):
        for token in range(logits.shape[1]):
            if not words[token // 32] >> token % 32 & 1:
                masked[row, token] = float("-inf")
    return masked
