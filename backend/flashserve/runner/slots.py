"""Per-slot state that outlives a step: block tables, the sampler's state, last tokens."""

from __future__ import annotations

import numpy as np
import torch

from flashserve.config import ResolvedConfig
from flashserve.runner.sampler_state import SamplerState
from flashserve.scheduling.output import Admission, ScheduledRow


class SlotTable:
    """Arrays indexed by slot, on the host. Last tokens and a copy of the block tables lie on the device, so that a
    decode step reads both without a copy of more than what changed. On a CPU the copy is the host's own memory."""

    def __init__(self, num_slots: int, max_blocks: int, device: torch.device, *, late: bool = False) -> None:
        """late: whether steps may be under way while the table changes."""
        self.spare_slot = num_slots
        """A slot of no request, for a bucket's padding."""
        self.block_table = np.zeros((num_slots + 1, max_blocks), np.int32)
        self.num_blocks = np.zeros(num_slots, np.int32)
        self.min_end_position = np.full(num_slots, -1, np.int64)
        """Logits of positions before this one may not choose an end token."""
        self.end_tokens: list[tuple[int, ...]] = [()] * num_slots
        self.device_block_table = torch.from_numpy(self.block_table).to(device)
        self.sampler = SamplerState(num_slots + 1, device, late=late)
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)

    @classmethod
    def for_engine(cls, resolved: ResolvedConfig, device: torch.device, *, late: bool = False) -> SlotTable:
        """A slot for each request that may run, with room for the longest."""
        return cls(resolved.max_num_seqs, -(-resolved.max_model_len // resolved.block_size), device, late=late)

    def admit(self, admission: Admission) -> None:
        """Start a slot afresh; what its last owner left does not matter."""
        slot, params = admission.slot, admission.params
        self.num_blocks[slot] = 0
        self.sampler.admit(admission)
        self.end_tokens[slot] = admission.end_token_ids
        # Position p gives generated token p + 1 - num_prompt_tokens; those below min_tokens must go on.
        free_from = admission.num_prompt_tokens - 1 + params.min_tokens
        self.min_end_position[slot] = free_from if params.min_tokens and admission.end_token_ids else -1

    def append_blocks(self, row: ScheduledRow) -> np.ndarray:
        """Extend the slot's block table. Returns the flat places that changed."""
        first = self.num_blocks[row.slot]
        end = first + len(row.new_block_ids)
        self.block_table[row.slot, first:end] = row.new_block_ids
        self.num_blocks[row.slot] = end
        return np.arange(first, end, dtype=np.int64) + row.slot * self.block_table.shape[1]

    def early_ends(self, slots: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """(rows, tokens) that min_tokens rules out for samples of these slots at these positions."""
        early = np.flatnonzero(positions < self.min_end_position[slots])
        if not early.size:
            return None
        pairs = [(row, token) for row in early.tolist() for token in self.end_tokens[slots[row]]]
        rows, tokens = np.array(pairs, np.int64).T
        return rows, tokens
