"""Chooses each sampling row's token, with as little work as its parameters allow."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flashserve.runner.slots import SlotTable
from flashserve_kernels import greedy, mask_tokens_, sample


class Sampler:
    """Greedy and sampled rows may share a batch; neither changes the other's tokens."""

    def __init__(self, slots: SlotTable, device: torch.device) -> None:
        self._slots = slots
        self._device = device

    def __call__(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        """logits: [N, V], overwritten; slots, positions: [N] int64 on the host. Returns token ids [N] int64."""
        self._mask_early_ends(logits, slots, positions)
        random = self._slots.temperature[slots] > 0
        if not random.any():
            return greedy(logits)
        if random.all():
            return self._sample(logits, slots, positions)
        tokens = torch.empty(len(slots), dtype=torch.int64, device=self._device)
        for chosen, rows in (
            (lambda part, rows: greedy(part), np.flatnonzero(~random)),
            (lambda part, rows: self._sample(part, slots[rows], positions[rows]), np.flatnonzero(random)),
        ):
            index = self._to_device(rows)
            tokens.index_copy_(0, index, chosen(logits.index_select(0, index), rows))
        return tokens

    def _sample(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> Tensor:
        table = self._slots
        min_p, top_k, top_p = table.min_p[slots], table.top_k[slots], table.top_p[slots]
        return sample(
            logits,
            temperature=self._to_device(table.temperature[slots]),
            min_p=self._to_device(min_p) if min_p.any() else None,
            top_k=self._to_device(top_k) if top_k.any() else None,
            top_p=self._to_device(top_p) if (top_p < 1).any() else None,
            seeds=self._to_device(table.seed[slots]),
            positions=self._to_device(positions),
        )

    def _mask_early_ends(self, logits: Tensor, slots: np.ndarray, positions: np.ndarray) -> None:
        """min_tokens: rule out end tokens for the first samples."""
        early = np.flatnonzero(positions < self._slots.min_end_position[slots])
        if not early.size:
            return
        pairs = [(row, token) for row in early.tolist() for token in self._slots.end_tokens[slots[row]]]
        rows, tokens = np.array(pairs, np.int64).T
        mask_tokens_(logits, self._to_device(rows), self._to_device(tokens))

    def _to_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
