"""Steps that are recorded once and replayed: a CPU's counterpart of CUDA graphs, as a runner sees it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

TOKENS, SEQS, LOGITS = range(3)
"""What a tensor of a step has one row for: its tokens, its sequences, its rows of logits."""


class StepProgram(Protocol):
    """A list of operations with the addresses of their tensors; sizes are given to each run."""

    @property
    def kinds(self) -> list[int]:
        """The recorded operations' kinds, for profiles."""
        ...

    def add_input(self, tensor: Tensor, size: int) -> None:
        """Declare a tensor that the caller fills before each run: its first dimension is TOKENS, SEQS or LOGITS."""
        ...

    def recording(self) -> AbstractContextManager[None]:
        """Within it operations are recorded instead of run."""
        ...

    def run(self, num_tokens: int, num_seqs: int, num_logits: int) -> None:
        """Replay for a step of these sizes."""
        ...
