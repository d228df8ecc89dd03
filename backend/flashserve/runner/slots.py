"""Per-slot state that outlives a step: block tables, sampling parameters, last tokens."""

from __future__ import annotations

import numpy as np
import torch

from flashserve.scheduling.output import Admission, ScheduledRow

GREEDY_BELOW = 1e-5  # temperatures below it are greedy, as in vLLM


class SlotTable:
    """Arrays indexed by slot. Numbers that only the host needs are numpy; last tokens live on the device, so that
    a decode step reads its own last sample without a copy to the host."""

    def __init__(self, num_slots: int, max_blocks: int, device: torch.device) -> None:
        self.block_table = np.zeros((num_slots, max_blocks), np.int32)
        self.num_blocks = np.zeros(num_slots, np.int32)
        self.temperature = np.zeros(num_slots, np.float32)
        self.top_k = np.zeros(num_slots, np.int64)
        self.top_p = np.ones(num_slots, np.float32)
        self.min_p = np.zeros(num_slots, np.float32)
        self.seed = np.zeros(num_slots, np.int64)
        self.min_end_position = np.full(num_slots, -1, np.int64)
        """Logits of positions before this one may not choose an end token."""
        self.end_tokens: list[tuple[int, ...]] = [()] * num_slots
        self.last_token = torch.zeros(num_slots, dtype=torch.int64, device=device)

    def admit(self, admission: Admission) -> None:
        """Start a slot afresh; what its last owner left does not matter."""
        slot, params = admission.slot, admission.params
        self.num_blocks[slot] = 0
        self.temperature[slot] = params.temperature if params.temperature >= GREEDY_BELOW else 0.0
        self.top_k[slot] = max(0, params.top_k)
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.seed[slot] = np.uint64(admission.seed & 0xFFFF_FFFF_FFFF_FFFF).astype(np.int64)
        self.end_tokens[slot] = admission.end_token_ids
        # Position p gives generated token p + 1 - num_prompt_tokens; those below min_tokens must go on.
        free_from = admission.num_prompt_tokens - 1 + params.min_tokens
        self.min_end_position[slot] = free_from if params.min_tokens and admission.end_token_ids else -1

    def append_blocks(self, row: ScheduledRow) -> None:
        first = self.num_blocks[row.slot]
        end = first + len(row.new_block_ids)
        self.block_table[row.slot, first:end] = row.new_block_ids
        self.num_blocks[row.slot] = end
