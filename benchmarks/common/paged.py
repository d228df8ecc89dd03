"""Rows for the attention ops of every device."""

from __future__ import annotations

import torch

from flashserve_kernels.attention import AttentionBatch

BLOCK_SIZE = 16


def make_batch(rows: int, queries: int, context: int, device: torch.device) -> AttentionBatch:
    """Equal rows, of whose context the last ``queries`` tokens are computed; shuffled blocks, and nothing is stored."""
    width = -(-context // BLOCK_SIZE)
    blocks = torch.randperm(rows * width, generator=torch.Generator(device).manual_seed(0), device=device)
    return AttentionBatch(
        query_start_loc=torch.arange(rows + 1, dtype=torch.int32, device=device) * queries,
        seq_lens=torch.full((rows,), context, dtype=torch.int32, device=device),
        block_tables=blocks.to(torch.int32).view(rows, width),
        slot_mapping=torch.full((rows * queries,), -1, device=device),
        block_size=BLOCK_SIZE,
        max_query_len=queries,
    )
